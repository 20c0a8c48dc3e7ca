"""Mistakes on the command line: one sentence on stderr, exit status 2, nothing written, and no waiting before it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_model import write_repository

from bonsai_image.loaders import ModelFileError, load_transformer, save_transformer
from bonsai_image.standalone import generate as generating
from bonsai_image.standalone.cli import main

MINIATURE = Path(__file__).parent.parent / "miniature"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("cli") / "bonsai-mini")


def run(*argv) -> int:
    return main([str(word) for word in argv])


def sentence(capsys) -> str:
    """What was said, which has to be one line."""
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("bonsai-image: ")
    return said


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_that_is_not_there_is_one_sentence(tmp_path, capsys, device):
    assert run("demo", "--out", tmp_path / "demo.png", "--device", device) == 2
    error = capsys.readouterr().err
    assert device in error and "omit it to use" in error and len(error.strip().splitlines()) == 1


def test_a_reference_that_is_no_image_is_one_sentence(pack, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert run("generate", "--checkpoint", pack, "--prompt", "x", "--image", tmp_path / "a.png") == 2
    error = capsys.readouterr().err
    assert "a.png" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [("--width", 100), ("--height", 0), ("--steps", 0)], ids=str)
def test_bad_sizes_are_one_sentence(pack, tmp_path, capsys, words):
    assert run("generate", "--checkpoint", pack, "--prompt", "x", "--out", tmp_path / "x.png", *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_missing_pack_is_one_sentence(tmp_path, capsys):
    assert run("generate", "--checkpoint", tmp_path / "nothing", "--prompt", "x") == 2
    error = capsys.readouterr().err
    assert "nothing" in error and len(error.strip().splitlines()) == 1


@pytest.fixture
def no_drawing(monkeypatch):
    """Nothing may be loaded before the arguments are checked."""
    monkeypatch.setattr(generating, "load_text_encoder", lambda *_: pytest.fail("the drawing began"))


@pytest.mark.parametrize(("name", "said"), [("picture", "end in .png"), ("a.jpg", "end in .png"),
                                            ("folder.png", "must end in .png"),
                                            ("file.txt/a.png", "not a writable folder")])
def test_a_picture_that_cannot_be_written(pack, tmp_path, capsys, no_drawing, name, said):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(SystemExit) as caught:
        run("generate", "--checkpoint", pack, "--prompt", "x", "--out", tmp_path / name)
    assert caught.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_the_default_picture_that_cannot_be_written(pack, tmp_path, capsys, no_drawing, monkeypatch):
    (tmp_path / "bonsai.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run("generate", "--checkpoint", pack, "--prompt", "x")
    assert caught.value.code == 2 and "must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
def test_a_seed_out_of_range(pack, capsys, no_drawing, seed):
    with pytest.raises(SystemExit) as caught:
        run("generate", "--checkpoint", pack, "--prompt", "x", "--seed", seed)
    assert caught.value.code == 2 and "seed" in capsys.readouterr().err.splitlines()[-1]


def test_a_transformer_that_is_not_there(pack, tmp_path, capsys, no_drawing):
    assert run("generate", "--checkpoint", pack, "--prompt", "x", "--transformer", tmp_path / "nothing") == 2
    assert "nothing there" in sentence(capsys)


def test_a_transformer_of_another_text_width(pack, tmp_path, capsys):
    other = MINIATURE / "binary.safetensors"
    assert run("generate", "--checkpoint", pack, "--prompt", "x", "--transformer", other, "--out", tmp_path / "a.png",
               "--device", "cpu", "--json") == 2
    assert "binary.safetensors: expected a model for text 384 wide" in sentence(capsys)


def test_code_beside_a_tokenizer_never_runs(pack, tmp_path):
    """Not even where the library would ask, and somebody says yes."""
    evil = shutil.copytree(pack, tmp_path / "evil")
    file = evil / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "EvilTokenizer",
                                "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    ran = tmp_path / "ran"
    (file.parent / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import Qwen2Tokenizer\n"
                                         "class EvilTokenizer(Qwen2Tokenizer): pass\n")
    words = ("generate", "--checkpoint", evil, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
             "--json", "--width", "32", "--height", "32")
    done = subprocess.run([sys.executable, "-m", "bonsai_image", *map(str, words)], input="yes\n" * 9, text=True,
                          capture_output=True)
    assert not ran.exists()
    assert done.returncode == 2 and "tokenizer" in done.stderr.splitlines()[-1]
    assert "trust_remote_code" not in done.stderr


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_tokenizer_without_its_vocabulary(tmp_path, capsys, content):
    """It would turn every prompt into nothing, and draw something."""
    broken = shutil.copytree(MINIATURE / "ternary", tmp_path / "broken")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (broken / "tokenizer" / name).unlink(missing_ok=True)
    if content is not None:
        (broken / "tokenizer" / "tokenizer.json").write_text(content)
    assert run("generate", "--checkpoint", broken, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
               "--json") == 2
    assert "tokenizer" in sentence(capsys) and not (tmp_path / "a.png").exists()


def test_a_damaged_scheduler(pack, tmp_path, capsys):
    broken = shutil.copytree(pack, tmp_path / "broken")
    (broken / "scheduler").mkdir(exist_ok=True)
    (broken / "scheduler" / "scheduler_config.json").write_text("{")
    assert run("generate", "--checkpoint", broken, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
               "--json") == 2
    assert "scheduler" in sentence(capsys)


def test_several_files_are_not_a_damaged_repository(pack, tmp_path, capsys):
    for name in ("a.safetensors", "b.SAFETENSORS"):
        (tmp_path / name).touch()
    for words in (("inspect", tmp_path), ("convert", tmp_path, tmp_path / "c.safetensors", "--to", "comfy")):
        assert run(*words) == 2
        assert "2 files; choose one of the files" in sentence(capsys)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_a_disk_that_is_gone_is_no_free_name(pack, tmp_path, capsys):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "unplugged" / "a.safetensors")
    assert run("convert", pack, tmp_path / "a.safetensors", "--to", "comfy") == 2
    assert "existing" in sentence(capsys) and (tmp_path / "a.safetensors").is_symlink()


def test_a_name_taken_while_writing_is_kept(pack, tmp_path, monkeypatch):
    from bonsai_image.loaders import save

    target, verify = tmp_path / "a.safetensors", save._verify

    def slow(*args):
        verify(*args)
        target.write_text("somebody else's")

    monkeypatch.setattr(save, "_verify", slow)
    with pytest.raises(ModelFileError, match="existing"):
        save_transformer(load_transformer(pack / "transformer-packed-mflux"), target, "comfy")
    assert target.read_text() == "somebody else's" and list(tmp_path.iterdir()) == [target]


def test_a_full_disk(pack, tmp_path, capsys, monkeypatch):
    from bonsai_image.loaders.formats import comfy

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfy, "save_file", full)
    assert run("convert", pack, tmp_path / "a.safetensors", "--to", "comfy") == 2
    assert "No space left on device; free some space" in sentence(capsys) and not list(tmp_path.iterdir())


def test_a_console_that_cannot_show_a_name(pack, tmp_path):
    target = tmp_path / "日本.safetensors"
    done = subprocess.run([sys.executable, "-m", "bonsai_image", "convert", str(pack), str(target), "--to", "comfy"],
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and target.exists()


def test_a_photo_lying_on_its_side_is_turned(tmp_path):
    from bonsai_image.standalone.cli import _reference

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64)).save(tmp_path / "photo.jpg", exif=exif)
    assert _reference(tmp_path / "photo.jpg").size == (64, 128)


def test_out_of_memory_is_no_damaged_vae(pack, monkeypatch):
    from bonsai_image.standalone import models

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        models.vae_module(pack / "vae", torch.device("cpu"), torch.float32)
