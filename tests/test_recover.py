"""``bonsai-image recover``: a LoRA for the packed miniature, distilled from the dense one."""

import errno
import io
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import load_transformer, lora
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.miniature.train.scenes import COLOURS
from bonsai_image.standalone.batch.rows import Row
from bonsai_image.standalone.generate import Compute
from bonsai_image.standalone.recover import cost, student
from bonsai_image.standalone.recover import run as one_run
from bonsai_image.tests.support.command_line import BINARY, MINIATURE, run, sentence

DENSE = MINIATURE / "dense"
PROMPTS = [f"a large {colour} {shape} on the left on a white background" for colour in COLOURS
           for shape in ("star", "circle", "ring", "square", "cross")]
HELD_OUT, UPDATES, GB = 4, 8, 1e9


def recover(folder, *words, prompts=None, out="lora.safetensors", teacher=DENSE) -> int:
    """The exit status of a short run in ``folder``."""
    if prompts is None:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return run("recover", "--checkpoint", MINIATURE / "ternary", "--transformer", BINARY, "--teacher", teacher,
               "--prompts", prompts, "--out", folder / out, "--work", folder / "work", "--device", "cpu", "--dtype",
               "fp32", "--width", 64, "--height", 64, "--steps", 2, "--rank", 8, "--updates", UPDATES, "--batch", 8,
               "--per-device-batch", 4, "--learning-rate", 1e-2, "--held-out", HELD_OUT, *words)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with all that a run leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert recover(folder) == 0
    return folder


@pytest.fixture
def drawn(undisturbed, tmp_path):
    """A folder in which the dense model has drawn, and nothing is trained."""
    shutil.copytree(undisturbed / "work", tmp_path / "work")
    state(tmp_path).unlink()
    return tmp_path


def state(folder):
    """The file of the one training in ``folder``."""
    (path,) = (folder / "work").glob("state-*")
    return path


def kept(folder) -> dict:
    """The state of the one training in ``folder``."""
    return torch.load(state(folder), weights_only=True)


def about(path) -> dict:
    """What a LoRA says of itself."""
    with safe_open(path, "pt") as file:
        (text,) = file.metadata().values()
    return json.loads(text)


def assert_same(folder, other) -> None:
    """Two runs have left the same LoRA and the same state, to the bit."""
    torch.testing.assert_close(kept(folder), kept(other), rtol=0, atol=0)
    assert (folder / "lora.safetensors").read_bytes() == (other / "lora.safetensors").read_bytes()


def test_the_lora_brings_the_packed_model_nearer_to_the_dense_one(undisturbed):
    said = about(undisturbed / "lora.safetensors")
    assert said["variant"] == "binary" and said["rank"] == 8 and 0 < said["update"] <= UPDATES
    assert all(after < 0.99 * before for after, before in zip(said["after"], said["before"], strict=True))
    losses = kept(undisturbed)["losses"]
    assert len(losses) == UPDATES and sum(losses[-3:]) < sum(losses[:3])
    assert {path.name for path in undisturbed.glob("lora*")} == {"lora.safetensors", "lora.png", "lora-sheet.png"}


def test_a_wrong_teacher_makes_it_worse_and_nothing_is_written(drawn, capsys):
    """All prompts but those held out are drawn by a model that goes the other way."""
    held_out = {str(i * len(PROMPTS) // HELD_OUT) for i in range(HELD_OUT)}
    for path in (drawn / "work").glob("latents-*"):
        save_file({name: each if name in held_out else 2 * each[:1] - each for name, each in load_file(path).items()},
                  path)
    assert recover(drawn) == 1
    assert "No LoRA was written" in capsys.readouterr().out and not (drawn / "lora.safetensors").exists()
    errors = kept(drawn)["errors"]
    assert len(errors) > 5 and all(error[-1] > errors[0][1][-1] for _, error in errors[1:])


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_continued_run_is_the_undisturbed_one(how, drawn, undisturbed, monkeypatch, capsys):
    update = student.Student._update

    def disturbed(self, number, *state):
        if number == 3 and how == "killed":
            raise SystemExit
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, number, *state)

    monkeypatch.setattr(student.Student, "_update", disturbed)
    if how == "killed":
        with pytest.raises(SystemExit):
            recover(drawn, "--save-minutes", 0)
    else:
        assert recover(drawn) == 130 and "the same command continues" in capsys.readouterr().err
    assert not (drawn / "lora.safetensors").exists()
    monkeypatch.undo()
    assert recover(drawn) == 0
    assert_same(drawn, undisturbed)


def another(_content: bytes) -> bytes:
    stream = io.BytesIO()
    torch.save({"step": 3}, stream)
    return stream.getvalue()


@pytest.mark.parametrize("damaged", [lambda _: b"", lambda content: content[:-1000], another],
                         ids=["empty", "cut short", "of another program"])
def test_a_damaged_state_is_one_sentence(damaged, drawn, undisturbed, capsys):
    whole = state(undisturbed)
    (drawn / "work" / whole.name).write_bytes(damaged(whole.read_bytes()))
    assert recover(drawn) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert whole.name in said and "remove it to train from the beginning" in said


@pytest.mark.parametrize("what", ["text-00002", "latents-00001", "lora"])
def test_a_full_disk_loses_nothing(what, tmp_path, drawn, undisturbed, monkeypatch, capsys):
    (tmp_path / "work" / f"{what}.safetensors").unlink(missing_ok=True)
    whole = one_run.write_whole

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(one_run, "write_whole",
                        lambda path, content: (full if path.stem == what else whole)(path, content))
    if what == "lora":
        monkeypatch.setattr(lora, "save_file", full)
    assert recover(tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert what in said and "No space left" in said and "free some space" in said
    monkeypatch.undo()
    assert recover(tmp_path) == 0
    assert_same(tmp_path, undisturbed)


def test_parts_are_the_whole_and_text_can_be_encoded_again(undisturbed, tmp_path):
    for part in ("1/2", "2/2"):
        assert recover(tmp_path, "--encode-again", "--shards", part) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    assert written.keys() == {"manifest.json", "latents-00001.safetensors", "latents-00002.safetensors"}
    assert all((undisturbed / "work" / name).read_bytes() == content for name, content in written.items())


def no_klein(folder):
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(1)}, folder / "flux1.safetensors")
    return folder / "flux1.safetensors"


def test_inspect_says_what_a_recovery_lora_is_for(undisturbed, tmp_path, capsys):
    path = undisturbed / "lora.safetensors"
    assert run("inspect", path) == 0
    said = capsys.readouterr().out
    assert 'recovery, variant: "binary"' in said and "recovery, rank: 8" in said and "recovery, after: [" in said
    assert run("inspect", path, "--json") == 0 and json.loads(capsys.readouterr().out)[0]["recovery"] == about(path)
    for metadata, status in (("[]", 0), ("{", 2)):
        save_file(load_file(path), tmp_path / "odd.safetensors", {"bonsai.recovery": metadata})
        assert run("inspect", tmp_path / "odd.safetensors") == status
    assert "odd.safetensors: expected metadata that can be read" in sentence(capsys)


@pytest.mark.parametrize(("teacher", "found"), [
    (no_klein, "found a FLUX.1 model"), (lambda _: BINARY, "more, such as"),
    (lambda _: MINIATURE / "ternary", "more, such as"), (lambda folder: folder / "none", "nothing there"),
    (lambda _: MINIATURE / "blue_pot_lora.safetensors", "found a LoRA"),
])
def test_what_is_no_dense_klein_is_refused(teacher, found, tmp_path, capsys):
    assert recover(tmp_path, teacher=teacher(tmp_path)) == 2
    said = sentence(capsys)
    assert found in said and "give --teacher the dense FLUX.2 Klein 4B" in said and not (tmp_path / "work").exists()


def test_a_teacher_of_another_size_is_refused(small, tmp_path, capsys):
    for path in (small.diffusers, small.comfyui):
        assert recover(tmp_path, teacher=path) == 2
        said = sentence(capsys)
        assert "expected num_attention_heads 1" in said and "found num_attention_heads" in said


@pytest.mark.parametrize(("words", "complaint"), [
    (("--steps", 3), "expected latents with steps 3, found with 2"), (("--held-out", 21), "too few"),
    (("--out", "lora.pt"), "must end in .safetensors"), (("--backend", "mlx"), "give --backend torch"),
])
def test_what_does_not_fit_is_refused(words, complaint, drawn, capsys):
    assert recover(drawn, *words) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_row_of_another_size_and_a_lora_that_is_there_are_refused(tmp_path, capsys):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,width\na star,128\n")
    assert recover(tmp_path, prompts=table) == 2 and "leave out all columns but" in sentence(capsys)
    table.write_text("prompt\na star\n" + "star " * 40)
    words = "--held-out", 1, "--batch", 2, "--per-device-batch"
    assert recover(tmp_path, *words, 2, prompts=table) == 2
    assert "give --per-device-batch 1" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "lora.safetensors").touch()
    assert recover(tmp_path) == 2 and "expected a path that is free" in sentence(capsys)


def test_the_4b_release_fits_into_small_gpus():
    """At 512 x 512 and rank 32, and what an update takes: the figures of docs/recovery.md."""
    counted = cost.counted(KleinConfig(), 1024, 1, 32, 1_380_000_000)
    assert counted.drawing < 12 * GB and 3 * GB < counted.training < 6 * GB
    assert 8e12 < counted.operations < 13e12
    assert cost.counted(KleinConfig(), 4096, 8, 256, 1_380_000_000).training > 24 * GB


@pytest.mark.parametrize(("gpu", "disk", "complaint"), [
    (0.5, 100, "lower --per-device-batch"), (24, 0, "give another --work, --encode-again"), (24, 100, None)])
def test_too_little_memory_or_disk_is_said_at_once(gpu, disk, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gpu * GB), 24 * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk * GB))
    options = {"per_device_batch": 1, "rank": 32, "encode_again": False, "steps": 4, "batch": 4, "updates": 3000,
               "width": 512, "height": 512}
    this = SimpleNamespace(
        args=SimpleNamespace(**options), packed=load_transformer(BINARY), sampler=SimpleNamespace(tokens=1024),
        store=one_run.Store(tmp_path / "new", (Row("a star"),)), compute=Compute(torch.device("cuda"), torch.half))
    if complaint is None:
        cost.announce(this)
    else:
        with pytest.raises(ValueError, match=complaint):
            cost.announce(this)
    assert "1 prompts at 512 x 512 take 0.0 GB" in capsys.readouterr().err and not list(tmp_path.iterdir())
