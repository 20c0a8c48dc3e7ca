"""Mistakes on the command line: one sentence on stderr, exit status 2, nothing written, and no waiting before it."""

import io
import json
import shutil
import sys

import pytest

from bonsai_image.standalone import generate as generating
from bonsai_image.tests.support.command_line import MINIATURE, run, sentence


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_unavailable_device_is_one_sentence(tmp_path, capsys, device):
    assert run("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "x", "--out", tmp_path / "a.png",
               "--device", device) == 2
    error = sentence(capsys)
    assert device in error and "omit it to use" in error


def test_reference_that_is_no_image_is_one_sentence(repository, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert run("generate", "--checkpoint", repository, "--prompt", "x", "--image", tmp_path / "a.png") == 2
    assert "a.png" in sentence(capsys)


@pytest.mark.parametrize("words", [("--width", 100), ("--height", 0), ("--steps", 0)], ids=str)
def test_bad_sizes_are_one_sentence(repository, tmp_path, capsys, words):
    assert run("generate", "--checkpoint", repository, "--prompt", "x", "--out", tmp_path / "x.png", *words) == 2
    assert words[0].removeprefix("--") in sentence(capsys) and not (tmp_path / "x.png").exists()


def test_missing_checkpoint_is_one_sentence(tmp_path, capsys):
    assert run("generate", "--checkpoint", tmp_path / "nothing", "--prompt", "x") == 2
    assert "nothing" in sentence(capsys)


@pytest.fixture
def before_drawing(monkeypatch):
    """Nothing may be loaded before the arguments are checked."""
    monkeypatch.setattr(generating.loaders, "load_text_encoder", lambda *_: pytest.fail("the drawing began"))


@pytest.mark.parametrize(("name", "said"), [("picture", "end in .png"), ("a.jpg", "end in .png"),
                                            ("folder.png", "must end in .png"),
                                            ("file.txt/a.png", "not a writable folder")])
def test_unwritable_output_fails_before_drawing(repository, tmp_path, capsys, before_drawing, name, said):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(SystemExit) as caught:
        run("generate", "--checkpoint", repository, "--prompt", "x", "--out", tmp_path / name)
    assert caught.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_unwritable_default_output_fails_before_drawing(repository, tmp_path, capsys, before_drawing, monkeypatch):
    (tmp_path / "bonsai.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run("generate", "--checkpoint", repository, "--prompt", "x")
    assert caught.value.code == 2 and "must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(repository, capsys, before_drawing, seed):
    assert run("generate", "--checkpoint", repository, "--prompt", "x", "--device", "cpu", "--seed", seed) == 2
    assert f"between 0 and 2**63 - 1, got {seed}" in sentence(capsys)


def test_missing_transformer_is_one_sentence(repository, tmp_path, capsys, before_drawing):
    assert run("generate", "--checkpoint", repository, "--prompt", "x", "--transformer", tmp_path / "nothing") == 2
    assert "nothing there" in sentence(capsys)


def test_transformer_of_another_text_width_is_refused(repository, tmp_path, capsys):
    other = MINIATURE / "binary.safetensors"
    assert run("generate", "--checkpoint", repository, "--prompt", "x", "--transformer", other,
               "--out", tmp_path / "a.png", "--device", "cpu", "--json") == 2
    assert "binary.safetensors: expected a model for text 384 wide" in sentence(capsys)


def test_code_beside_a_tokenizer_never_runs(repository, tmp_path, capsys, monkeypatch):
    """Not even if the library asked and somebody said yes."""
    evil = shutil.copytree(repository, tmp_path / "evil")
    file = evil / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "EvilTokenizer",
                                "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    ran = tmp_path / "ran"
    (file.parent / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import Qwen2Tokenizer\n"
                                         "class EvilTokenizer(Qwen2Tokenizer): pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    assert run("generate", "--checkpoint", evil, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
               "--json") == 2
    assert not ran.exists()
    message = sentence(capsys)
    assert "tokenizer" in message and "trust_remote_code" not in message


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_tokenizer_without_its_vocabulary_is_refused(tmp_path, capsys, content):
    """It would turn every prompt into nothing, and draw something."""
    broken = shutil.copytree(MINIATURE / "ternary", tmp_path / "broken")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (broken / "tokenizer" / name).unlink(missing_ok=True)
    if content is not None:
        (broken / "tokenizer" / "tokenizer.json").write_text(content)
    assert run("generate", "--checkpoint", broken, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
               "--json") == 2
    assert "tokenizer" in sentence(capsys) and not (tmp_path / "a.png").exists()


def test_damaged_scheduler_is_one_sentence(repository, tmp_path, capsys):
    broken = shutil.copytree(repository, tmp_path / "broken")
    (broken / "scheduler").mkdir(exist_ok=True)
    (broken / "scheduler" / "scheduler_config.json").write_text("{")
    assert run("generate", "--checkpoint", broken, "--prompt", "x", "--out", tmp_path / "a.png", "--device", "cpu",
               "--json") == 2
    assert "scheduler" in sentence(capsys)


def test_folder_of_several_files_names_the_choice(repository, tmp_path, capsys):
    for name in ("a.safetensors", "b.SAFETENSORS"):
        (tmp_path / name).touch()
    for words in (("inspect", tmp_path), ("convert", tmp_path, tmp_path / "c.safetensors", "--to", "comfy")):
        assert run(*words) == 2
        assert "2 files; choose one of the files" in sentence(capsys)


def test_a_prompt_that_is_no_text(tmp_path, capsys):
    assert run("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "a\udcff", "--out",
               tmp_path / "a.png") == 2
    assert r"the prompt 'a\udcff' is not valid text" in sentence(capsys)
