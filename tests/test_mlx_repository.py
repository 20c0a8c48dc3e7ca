"""``convert --to mlx`` of a whole repository: all that the readers of PrismML's MLX repositories look for."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer, load_vae
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.loaders.whole import difference
from bonsai_image.tests.support.command_line import run, sentence

WEIGHTS = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"
FILES = {WEIGHTS, "transformer-packed-mflux/config.json", "transformer-packed-mflux/quantization_config.json",
         "text_encoder-mlx-4bit/model.safetensors", "text_encoder-mlx-4bit/config.json",
         "text_encoder-mlx-4bit/tokenizer.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
         "tokenizer/chat_template.jinja", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
         "scheduler/scheduler_config.json", "model_index.json", "manifest.json"}


@pytest.mark.parametrize("through", ["folder", "checkpoint"])
def test_everything_is_there(through, repository, tmp_path):
    source, target = repository, tmp_path / "bonsai"
    if through == "checkpoint":
        source = tmp_path / "one.safetensors"
        assert run("convert", repository, source, "--to", "checkpoint") == 0
    assert run("convert", source, target, "--to", "mlx") == 0
    files = {file.relative_to(target).as_posix(): file for file in target.rglob("*") if file.is_file()}
    assert files.keys() >= FILES
    manifest = json.loads((target / "manifest.json").read_text())["files"]
    assert {entry["remote_path"] for entry in manifest} == files.keys() - {"manifest.json"}
    for entry in manifest:
        content = files[entry["remote_path"]].read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    stated = json.loads((target / "transformer-packed-mflux" / "quantization_config.json").read_text())
    assert (stated["bits"], stated["group_size"]) == (2, 128) and type(stated["bits"]) is int
    with safe_open(target / WEIGHTS, "pt") as file:
        assert not file.metadata()
    for name in (WEIGHTS, "text_encoder-mlx-4bit/model.safetensors"):
        ours, theirs = load_file(target / name), load_file(repository / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    for load in (load_transformer, load_text_encoder, load_vae):
        expected, found = load(repository), load(target)
        tensors = (to_comfyui(model.tensors) if load is load_transformer else model.tensors
                   for model in (expected, found))
        assert difference(*tensors) is None
        assert found.config | {"_class_name": 0} == expected.config | {"_class_name": 0} if load is load_vae else (
            found.config == expected.config)
    assert find_repository(target).require("tokenizer", "scheduler")


@pytest.mark.parametrize("encoder", ["te-hqq", "te-dense"])
def test_an_encoder_that_mlx_cannot_hold_exactly_is_refused(encoder, repository, root, tmp_path, capsys):
    copy = shutil.copytree(repository, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder-mlx-4bit")
    shutil.copytree(root / encoder, copy / "text_encoder")
    assert run("convert", copy, tmp_path / "bonsai", "--to", "mlx") == 2
    said = sentence(capsys)
    assert ("zeropoint" in said) if encoder == "te-hqq" else ("not packed in 4 bits" in said)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_encoder_that_comfyui_saved_is_refused(repository, tmp_path, capsys):
    """Without the layers that FLUX.2 Klein never reads, which other readers do."""
    assert run("convert", repository, tmp_path / "one.safetensors", "--to", "checkpoint") == 0
    tensors = {name: tensor for name, tensor in load_file(tmp_path / "one.safetensors").items()
               if not re.search(r"transformer\.model\.(norm|layers\.(2[789]|3\d))\.", name)}
    save_file(tensors, tmp_path / "saved.safetensors")
    assert run("convert", tmp_path / "saved.safetensors", tmp_path / "bonsai", "--to", "mlx") == 2
    assert "without its last layers" in sentence(capsys) and not (tmp_path / "bonsai").exists()


def test_a_diffusion_model_alone_is_one_folder(repository, tmp_path):
    assert run("convert", repository / "transformer-packed-mflux", tmp_path / "alone", "--to", "mlx") == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "config.json", "quantization_config.json", "diffusion_pytorch_model.safetensors"}
