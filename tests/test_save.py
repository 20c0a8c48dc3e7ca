"""Saving a diffusion model: existing files stay, a failure leaves nothing behind, and what was written is read back."""

import os

import pytest

from bonsai_image.loaders import ModelFileError, Transformer, load_transformer, models, save_transformer
from bonsai_image.loaders.formats import comfy
from bonsai_image.tests.support.command_line import BINARY, run, sentence


@pytest.fixture
def model(repository) -> Transformer:
    return load_transformer(repository / "transformer-packed-mflux")


def test_an_existing_target_is_never_replaced(repository, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"precious")
    assert run("convert", repository, target, "--to", "comfy") == 2
    assert "existing" in sentence(capsys)
    assert target.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [target]


def test_a_format_that_cannot_hold_the_model_is_refused(repository, tmp_path, capsys):
    assert run("convert", BINARY, tmp_path / "b.safetensors", "--to", "comfy-base3") == 2
    assert "base 3 stores ternary weights, not 1-bit symmetric ones; choose another format." in sentence(capsys)
    assert run("convert", repository, tmp_path / "b", "--to", "comfy") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_dangling_symlink_counts_as_existing(model, tmp_path):
    target = tmp_path / "a.safetensors"
    target.symlink_to(tmp_path / "unplugged" / "a.safetensors")
    with pytest.raises(ModelFileError, match="existing"):
        save_transformer(model, target, "comfy")
    assert target.is_symlink()


def test_a_target_created_while_writing_is_kept(model, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    monkeypatch.setattr(models, "difference", lambda *_: target.write_text("somebody else's") and None)
    with pytest.raises(ModelFileError, match="existing"):
        save_transformer(model, target, "comfy")
    assert target.read_text() == "somebody else's" and list(tmp_path.iterdir()) == [target]


def test_written_files_have_the_permissions_of_the_umask(model, tmp_path):
    (tmp_path / "ordinary").touch()
    save_transformer(model, tmp_path / "a.safetensors", "comfy")
    save_transformer(model, tmp_path / "probe", "mlx")
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "a.safetensors", *(tmp_path / "probe").iterdir())} == {expected}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(repository, tmp_path, capsys, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfy, "save_file", full)
    assert run("convert", repository, tmp_path / "a.safetensors", "--to", "comfy") == 2
    assert "No space left on device; free some space" in sentence(capsys) and not list(tmp_path.iterdir())


def test_a_file_that_reads_back_differently_is_refused(model, tmp_path, monkeypatch):
    write = comfy.save_file

    def flip(tensors, path, metadata):
        write(tensors, path, metadata)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(comfy, "save_file", flip)
    with pytest.raises(ModelFileError, match="difference after writing"):
        save_transformer(model, tmp_path / "a.safetensors", "comfy")
    assert not list(tmp_path.iterdir())
