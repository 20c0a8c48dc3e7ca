"""What disks, other systems and the Hub's client do to files: each kind ends in one sentence, and nothing is lost."""

import errno
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from bonsai_image import disk
from bonsai_image.loaders import ModelFileError, load_transformer, models, save_transformer
from bonsai_image.loaders.description import publication
from bonsai_image.loaders.files import locate, refuse_changed
from bonsai_image.loaders.opening import fingerprint
from bonsai_image.published import RELEASES
from bonsai_image.standalone import download
from bonsai_image.standalone.batch import rows
from bonsai_image.tests.support.sound_files import FILES, load, refusal

BINARY = Path(__file__).parent.parent / "miniature" / "binary.safetensors"
RELEASE = RELEASES["ternary", "mlx"]
NAME = RELEASE.id.split("/")[1]


class PanicError(BaseException):
    """As a Rust library raises it through pyo3."""


def failing(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """How long was waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(disk, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def hub(monkeypatch):
    """A hub with an empty repository."""
    info = SimpleNamespace(sha="0" * 40, siblings=[])
    monkeypatch.setattr(download.HfApi, "model_info", Mock(return_value=info))
    fetch = Mock(side_effect=lambda *_, local_dir, **__: local_dir.mkdir(exist_ok=True))
    monkeypatch.setattr(download, "snapshot_download", fetch)
    return fetch


@pytest.mark.parametrize("error", [
    RuntimeError("Data processing error: CAS service error : Reqwest Error. Retry"), ValueError("odd"),
    TimeoutError(), PanicError("index out of bounds"), ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    RuntimeError("IO Error: No space left on device (os error 28)"),
    *map(failing, (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL,
                   errno.ENOENT))], ids=repr)
@pytest.mark.parametrize("where", ["list", "fetch", "record", "rename"])
def test_whatever_stops_a_download_is_one_sentence(where, error, hub, tmp_path, monkeypatch, capsys):
    stopped = Mock(side_effect=error)
    with monkeypatch.context() as patch:
        patch.setattr(*{"list": (download.HfApi, "model_info"), "fetch": (download, "snapshot_download"),
                        "record": (download, "write_whole"), "rename": (os, "rename")}[where], stopped)
        with pytest.raises(SystemExit):
            download.main(["download", "--variant", "ternary", "--to", str(tmp_path)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(r"bonsai-image: Downloading \S+ stopped \(.+\); whole files are kept in \S+, so .*run the same "
                        r"command again to continue\.", line) and not re.search(r"[.!?] +[A-Z]", line)
    assert ("free some space" in line) == ("No space" in str(error)) and ("check the disk" in line) == ("[Errno 5]" in
                                                                                                     str(error))
    assert download.download(RELEASE, None, tmp_path) == tmp_path / NAME


def test_a_download_can_be_cancelled(hub, tmp_path):
    hub.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        download.download(RELEASE, None, tmp_path)


@pytest.fixture(scope="module")
def model():
    return load_transformer(BINARY)


@pytest.mark.parametrize("what", ["whole file", "model", "download"])
def test_a_rename_is_tried_again(what, model, hub, tmp_path, pauses, monkeypatch):
    """A virus scanner on Windows holds what was just written."""
    for name in ("rename", "replace"):
        answers = [failing(errno.EACCES), failing(errno.EBUSY), None]
        real = getattr(os, name)

        def held(*args, real=real, answers=answers):
            if answers and (error := answers.pop(0)):
                raise error
            return real(*args)

        monkeypatch.setattr(os, name, held)
    target = tmp_path / "new.safetensors"
    if what == "whole file":
        disk.write_whole(target, b"x")
    elif what == "model":
        save_transformer(model, target, "comfy")
    else:
        target = download.download(RELEASE, None, tmp_path)
    assert list(tmp_path.iterdir()) == [target] and len(pauses) >= 2


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, None])
@pytest.mark.parametrize("name", ["fsync", "chmod"])
def test_what_a_file_system_lacks_is_done_without(name, number, model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, name, Mock(side_effect=failing(number) if number else NotImplementedError))
    before = descriptors()
    for folder in (tmp_path, tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        disk.write_whole(folder / "a.png", b"x")
    save_transformer(model, tmp_path / "a.safetensors", "comfy")
    assert (tmp_path / "a.safetensors").is_file() and descriptors() == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_an_error_and_leaves_nothing(number, model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=failing(number)))
    before = descriptors()
    with pytest.raises(OSError):
        disk.write_whole(tmp_path / "a.png", b"x")
    with pytest.raises(ModelFileError, match=f"{os.strerror(number)}.*and save again, for nothing was written"):
        save_transformer(model, tmp_path / "a.safetensors", "comfy")
    assert not list(tmp_path.iterdir()) and descriptors() == before


@pytest.mark.parametrize("full", [None, errno.ENOTSUP], ids=["macOS", "macOS on SMB"])
def test_macos_flushes_to_the_platter(full, tmp_path, monkeypatch):
    asked = Mock(side_effect=full and failing(full))
    monkeypatch.setattr(disk, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=asked))
    fsync = Mock()
    monkeypatch.setattr(os, "fsync", fsync)
    disk.write_whole(tmp_path / "a", b"x")
    assert asked.call_count == 2 and {call.args[1] for call in asked.mock_calls} == {51}
    assert fsync.call_count == (2 if full else 0)


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "close programs that use much memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
     "close programs that use much memory"),
    (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "check the disk and its free"),
    (failing(errno.EROFS), "choose another"), (failing(errno.ENAMETOOLONG), "shorter")], ids=str)
@pytest.mark.parametrize("step", ["_flush", "difference"])
def test_a_save_that_fails_says_why(step, error, words, model, tmp_path, monkeypatch):
    monkeypatch.setattr(models, step, Mock(side_effect=error))
    with pytest.raises(ModelFileError, match=f"{words}.* and save again, for nothing was written") as caught:
        save_transformer(model, tmp_path / "a.safetensors", "comfy")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_cannot_be_deleted_masks_no_error(model, tmp_path, monkeypatch):
    """On Windows a file that is still mapped cannot be."""
    monkeypatch.setattr(models, "difference", lambda *_: "a.weight")
    monkeypatch.setattr(os, "rmdir", Mock(side_effect=failing(errno.EACCES)))
    monkeypatch.setattr(os, "unlink", Mock(side_effect=failing(errno.EACCES)))
    with pytest.raises(ModelFileError, match="a difference after writing"):
        save_transformer(model, tmp_path / "a.safetensors", "comfy")


@pytest.mark.parametrize("name", ["sub\\a.safetensors", "sub/a.safetensors", "sub\\e\u0301.pt", "sub/e\u0301.pt",
                                  pytest.param("real\\b.pt", marks=pytest.mark.skipif(os.name == "nt", reason="/"))])
def test_names_of_another_system_are_found(name, tmp_path):
    (tmp_path / "sub").mkdir()
    for each in ("sub/a.safetensors", "sub/\u00e9.pt", "real\\b.pt"):
        (tmp_path / each).touch()
    assert locate(tmp_path, name).is_file() and not locate(tmp_path, "sub\\none").exists()
    assert Path(rows.make({"prompt": "a", "lora": name}, rows.Row(""), tmp_path).lora).is_file()


#: Where a download stopped, as shares of the data: from, to.
HOLES = {"all": (0, 1), "half": (0.5, 1), "end": (0.97, 1), "middle": (0.3, 0.7)}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("name", FILES)
def test_a_preallocated_download_is_not_finished(name, hole, copy):
    path = copy(name)
    file = path / FILES[name][1]
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else 4096
    start, stop = (header + int((size - header) * share) for share in HOLES[hole])
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(stop - start))
    assert "download" in (said := refusal(FILES[name][0], path)) and (file.suffix == ".pt" or "a finished" in said)


@pytest.mark.parametrize("name", ["vae", "te-dense", "comfy", "mlx"])
def test_a_tensor_of_zeros_is_sound(name, copy):
    """The first, the largest and the last in the file."""
    path = copy(name)
    file = path / FILES[name][1]
    tensors = load_file(file)
    for zero in (min(tensors), max(tensors, key=lambda key: tensors[key].nbytes), max(tensors)):
        if zero.endswith("comfy_quant"):
            continue
        save_file(tensors | {zero: torch.zeros_like(tensors[zero])}, file, {"format": "pt"})
        load(name, path)


def test_a_file_that_changes_is_noticed(tmp_path):
    file = tmp_path / "repository" / "part" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(BINARY.read_bytes())
    seen, loaded = fingerprint(tmp_path), load_transformer(file)
    refuse_changed(loaded.stamps)
    assert fingerprint(tmp_path) == seen
    os.utime(file, ns=(0, 0))
    assert fingerprint(tmp_path) != seen
    for change in (lambda: os.truncate(file, 1000), file.unlink):
        change()
        with pytest.raises(ModelFileError, match=r"expected the file that was loaded, found .*; load the model again"):
            refuse_changed(loaded.stamps)


def test_a_shared_file_belongs_to_the_repository_it_lies_in(tmp_path):
    ids = [RELEASES[variant, "mlx"].id for variant in ("ternary", "binary")]
    for folder, expected in ((ids[0], ids[:1]), (ids[1], ids[1:]), ("renamed", ids)):
        path = tmp_path / folder.split("/")[-1] / "text_encoder-mlx-4bit" / "model.safetensors"
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, 2263022529)
        said = publication(path)
        assert [each for each in ids if each in said] == expected
