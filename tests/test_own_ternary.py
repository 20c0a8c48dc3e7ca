"""Other people's ternary and binary, dense in groups of 128, 64 or 32, any dtype and layout; and Klein 9B's shapes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel

from bonsai_image.loaders import ModelFileError, klein, load_transformer, save_transformer
from bonsai_image.loaders.formats.comfy import metadata
from bonsai_image.loaders.formats.interface import About
from bonsai_image.loaders.names import to_comfyui, to_diffusers
from bonsai_image.ops.packed import equal, is_packed, unwrap
from bonsai_image.tests.support import model_files
from bonsai_image.tests.support.reference import dense64

NESTED = "model.diffusion_model."
LAYOUTS = {
    "folder": lambda model, path: model_files.write_diffusers(model, path),
    "shards": lambda model, path: model_files.write_diffusers(model, path, "1MB"),
    "file": lambda model, path: model_files.write_comfyui_single(to_comfyui(dict(model.state_dict())), path),
    "nested": lambda model, path: model_files.write_comfyui_single(to_comfyui(dict(model.state_dict())), path, NESTED),
    "diffusers-file": lambda model, path: model_files.write_comfyui_single(dict(model.state_dict()), path),
}
Q = "transformer_blocks.1.attn.to_q.weight"


def written(model, layout, root):
    folder = layout in ("folder", "shards")
    return LAYOUTS[layout](model, root / ("model" if folder else "model.safetensors"))


def packed(tensors):
    return {name: unwrap(tensor) for name, tensor in tensors.items() if is_packed(tensor)}


@pytest.mark.parametrize(("bits", "group", "dtype", "layout"), [
    (2, 64, torch.bfloat16, "folder"), (1, 32, torch.float16, "shards"), (2, 32, torch.float32, "nested"),
    (1, 64, torch.float32, "file"), (2, 128, torch.float16, "diffusers-file")])
def test_packs_exactly_and_stays_so(bits, group, dtype, layout, tmp_path):
    model = model_files.dense_model(bits, group=group).to(dtype)
    for name in model_files.packed_names(model):
        model.get_submodule(name).weight.div_(3)  # scales that fill the dtype
    loaded = load_transformer(written(model, layout, tmp_path))
    assert (loaded.format, loaded.variant) == ("dense", {1: "binary", 2: "ternary"}[bits])
    assert {(each.bits, each.group, each.scale.dtype) for each in packed(loaded.tensors).values()} == {
        (bits, group, dtype)}
    tensors = to_diffusers(loaded.tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(dense64(tensors[name]) if name in packed(tensors) else tensors[name].double(),
                           tensor.double()), name
    for target, name in (("comfy", "a.safetensors"), ("mlx", "mlx"), ("gemlite", "gemlite"), ("diffusers", "dense")):
        save_transformer(loaded, tmp_path / name, target)
        again = to_diffusers(load_transformer(tmp_path / name).tensors)
        assert all(equal(tensors[key], again[key]) for key in packed(tensors)), target


def test_one_group_for_all_layers(tmp_path):
    """That of q alone is 64, k and v have 128: ComfyUI joins the three, and MLX's JSON states one number."""
    model, other = model_files.dense_model(2), model_files.dense_model(2, group=64)
    model.get_parameter(Q).copy_(other.get_parameter(Q))
    loaded = load_transformer(written(model, "folder", tmp_path))
    assert {each.group for each in packed(to_comfyui(loaded.tensors)).values()} == {64}
    for target, name in (("mlx", "mlx"), ("gguf", "model.gguf")):
        save_transformer(loaded, tmp_path / name, target)
        again = to_diffusers(load_transformer(tmp_path / name).tensors)
        assert torch.equal(dense64(again[Q]), model.get_parameter(Q).double()) and unwrap(again[Q]).group == 64
    assert json.loads((tmp_path / "mlx" / "quantization_config.json").read_text())["group_size"] == 64
    with pytest.raises(ModelFileError, match="GGUF has no 2-bit symmetric weights in groups of 64; choose another fo"):
        save_transformer(loaded, tmp_path / "pq.gguf", "gguf-pq2_0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nearly_ternary_is_refused(layout, tmp_path):
    """One weight, one step of BF16 away."""
    model = model_files.dense_model(2, group=64)
    row = model.get_parameter(Q)[5]
    row.view(torch.int16)[row.nonzero()[0]] += 1
    with pytest.raises(ModelFileError, match=r"every group of 128, 64 or 32 weights -s, 0 or s, found.*row 5, group 0"):
        load_transformer(written(model, layout, tmp_path))


def test_shapes_of_klein_9b():
    """Read off the tensors in both namings; diffusers builds the same."""
    config = klein.KleinConfig(32, 3 * 4096, num_layers=8, num_single_layers=24)
    for shapes in (klein.comfyui_shapes(config), klein.diffusers_shapes(config)):
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert klein.read_config(Path("klein-9b"), meta) == config
    with init_empty_weights():
        model = Flux2Transformer2DModel(**config.diffusers())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    about = About("ternary", "here")
    assert metadata(about, config)["modelspec.title"] == "Bonsai Image 9B ternary"
    assert [metadata(about, each)["modelspec.license"] for each in (config, klein.KleinConfig())] == [
        "other", "apache-2.0"]
