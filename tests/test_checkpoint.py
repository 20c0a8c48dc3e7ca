"""A whole repository in one file: every part comes back bit for bit, and the command line draws the same with it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer, load_vae, whole
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.loaders.whole import difference
from bonsai_image.standalone.batch.rows import model_digest
from bonsai_image.standalone.generate import complete_repository
from bonsai_image.tests.support.command_line import BINARY, MINIATURE, SMALL, run, sentence


@pytest.fixture
def checkpoint(repository, tmp_path):
    assert run("convert", repository, tmp_path / "one.safetensors", "--to", "checkpoint") == 0
    return tmp_path / "one.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The miniature in one file."""
    path = tmp_path_factory.mktemp("trained") / "one.safetensors"
    assert run("convert", MINIATURE / "ternary", path, "--to", "checkpoint") == 0
    return path


def assert_same(repository, checkpoint):
    for load in (load_transformer, load_text_encoder, load_vae):
        expected, found = load(repository), load(checkpoint)
        tensors = to_comfyui(expected.tensors) if load is load_transformer else expected.tensors
        assert found.tensors.keys() == tensors.keys() and difference(tensors, found.tensors) is None
        assert found.config == expected.config and not found.warnings


def test_every_part_comes_back(repository, checkpoint, capsys):
    assert_same(repository, checkpoint)
    assert load_transformer(checkpoint).source == load_transformer(repository).source
    assert run("inspect", checkpoint, "--json") == 0
    parts = json.loads(capsys.readouterr().out)
    assert [part["kind"] for part in parts] == ["diffusion model", "text encoder", "VAE"]
    found = complete_repository(checkpoint)
    assert {found.transformer, found.text_encoder, found.vae, found.tokenizer} == {checkpoint}
    assert model_digest(found) != model_digest(complete_repository(repository))


@pytest.mark.parametrize("encoder", ["te-hqq", "te-dense"])
def test_text_encoders_of_every_form(encoder, repository, root, tmp_path):
    copy = shutil.copytree(repository, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder-mlx-4bit")
    shutil.copytree(root / encoder, copy / "text_encoder")
    assert run("convert", copy, tmp_path / "one.safetensors", "--to", "checkpoint") == 0
    assert_same(copy, tmp_path / "one.safetensors")


def test_it_draws_the_same(trained, tmp_path):
    """With the tokenizer, and the sizes of the VAE that no tensor shows, from the file alone."""
    images = []
    for source in (MINIATURE / "ternary", trained):
        assert run("generate", "--checkpoint", source, "--prompt", "a red circle", "--steps", 1, *SMALL,
                   "--out", tmp_path / "image.png") == 0
        images.append(Image.open(tmp_path / "image.png").tobytes())
    assert images[0] == images[1]


def _without_tokenizer(tensors):
    for name in [name for name in tensors if name.startswith("bonsai.tokenizer.")]:
        del tensors[name]


def _outside(tensors):
    tensors["bonsai.tokenizer.../../evil"] = tensors["bonsai.tokenizer.tokenizer.json"].clone()
    del tensors["bonsai.tokenizer.tokenizer.json"]


@pytest.mark.parametrize(("change", "metadata", "said"), [
    (_without_tokenizer, {}, "a checkpoint with the tokenizer of Bonsai Image, found none"),
    (_outside, {}, "a checkpoint with the tokenizer of Bonsai Image, found none"),
    (lambda t: t.update({"bonsai.tokenizer.tokenizer.json": torch.zeros(3)}), {}, "expected a Qwen3 tokenizer"),
    (lambda t: t.update({"bn.running_mean": t["vae.bn.running_mean"].clone()}), {}, "each tensor once"),
    (lambda t: t.pop("vae.bn.running_mean"), {}, "a checkpoint with the vae"),
    (lambda t: None, {"bonsai.vae": "{"}, "JSON in the metadata bonsai.vae"),
], ids=["no tokenizer", "outside", "not text", "twice", "no VAE", "not JSON"])
def test_damaged_checkpoints(change, metadata, said, trained, tmp_path, capsys):
    tensors = load_file(trained)
    change(tensors)
    with safe_open(trained, "pt") as file:
        save_file(tensors, tmp_path / "damaged.safetensors", file.metadata() | metadata)
    capsys.readouterr()
    assert run("generate", "--checkpoint", tmp_path / "damaged.safetensors", "--prompt", "a", *SMALL, "--json") == 2
    assert said in sentence(capsys) and not (tmp_path.parent / "evil").exists()


def test_nothing_is_left_of_what_fails(repository, tmp_path, capsys, monkeypatch):
    target = tmp_path / "one.safetensors"
    for source, path in ((BINARY, target), (repository, tmp_path / "folder"), (MINIATURE / "ternary" / "vae", target)):
        assert run("convert", source, path, "--to", "checkpoint") == 2
        sentence(capsys)

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "save_file", full)
    assert run("convert", repository, target, "--to", "checkpoint") == 2
    assert "No space left on device" in sentence(capsys) and not list(tmp_path.iterdir())
    assert find_repository(repository).transformer
