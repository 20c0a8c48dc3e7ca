"""Every format, written by the library that writes it, loads to exactly the weights that went in."""

import shutil
from pathlib import Path

import pytest
import torch

from bonsai_image.loaders import load_text_encoder, load_transformer, names, save_transformer
from bonsai_image.loaders.formats import gemlite, mlx
from bonsai_image.ops.packed import equal, is_packed, packed_weight, unwrap
from bonsai_image.tests.support import model_files
from bonsai_image.tests.support.reference import dense64

FORMATS = {"diffusers": "dense", "sharded": "dense", "comfyui": "dense", "gemlite": "gemlite", "mlx": "mlx"}


@pytest.mark.parametrize("kind", FORMATS)
def test_transformer_loads_bit_for_bit(small, kind):
    loaded = load_transformer(getattr(small, kind))
    assert loaded.format == FORMATS[kind]
    assert loaded.variant == {1: "binary", 2: "ternary"}[small.bits]
    assert loaded.config == load_transformer(small.mlx).config and not loaded.warnings
    tensors = names.to_diffusers(loaded.tensors)
    expected = small.model.state_dict()
    assert tensors.keys() == expected.keys()
    packed = {name for name, tensor in tensors.items() if is_packed(tensor)}
    assert packed == {f"{name}.weight" for name in model_files.packed_names(small.model)}
    for name, tensor in tensors.items():
        assert torch.equal(dense64(tensor) if name in packed else tensor, expected[name].to(
            torch.float64 if name in packed else torch.bfloat16)), name


def test_scales_keep_the_dtype_that_holds_them(small):
    """GemLite's float32 tables hold BF16 numbers, and are kept as such."""
    for kind in FORMATS:
        tensors = load_transformer(getattr(small, kind)).tensors
        assert {unwrap(t).scale.dtype for t in tensors.values() if is_packed(t)} == {torch.bfloat16}, kind


def test_gemlite_writes_what_we_write(small):
    """Our GemLite tensors equal GemLite's own, down to the metadata, apart from the optional meta_scale."""
    theirs = torch.load(small.gemlite / "state_dict.pt", weights_only=True)
    ours = gemlite.encode(names.to_diffusers(load_transformer(small.mlx).tensors))
    assert {name for name in theirs if not name.endswith("meta_scale")} == ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_mlx_writes_what_we_write(small):
    from safetensors.torch import load_file

    theirs = load_file(small.mlx / "diffusion_pytorch_model.safetensors")
    ours = mlx.encode(names.to_diffusers(load_transformer(small.gemlite).tensors))
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_gemlite_loads_without_its_folder(small, tmp_path):
    alone = tmp_path / "state_dict.pt"
    alone.write_bytes((small.gemlite / "state_dict.pt").read_bytes())
    assert load_transformer(alone).variant == load_transformer(small.gemlite).variant


def test_mlx_loads_without_its_folder(small, tmp_path):
    """The group size is then the format's usual one; bits follow from the shapes."""
    alone = tmp_path / "bonsai.safetensors"
    alone.write_bytes((small.mlx / "diffusion_pytorch_model.safetensors").read_bytes())
    ours, theirs = load_transformer(alone).tensors, load_transformer(small.mlx).tensors
    assert all(equal(ours[name], tensor) for name, tensor in theirs.items() if is_packed(tensor))


def test_gemlite_with_32_bit_words(small, tmp_path):
    state = torch.load(small.gemlite / "state_dict.pt", weights_only=True)
    for name in [name for name in state if name.endswith(".W_q")]:
        rows = state[name].t().contiguous()
        state[name] = rows.view(torch.int32).t().contiguous()
        state[name.replace("W_q", "metadata")][4] = 32 // small.bits
    torch.save(state, tmp_path / "state_dict.pt")
    wide, narrow = load_transformer(tmp_path).tensors, load_transformer(small.gemlite).tensors
    assert all(equal(wide[name], tensor) for name, tensor in narrow.items() if is_packed(tensor))


def test_nested_and_older_comfyui_names(small, tmp_path):
    tensors = names.to_comfyui(dict(small.model.state_dict()))
    older = {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in tensors.items()}
    path = model_files.write_comfyui_single(older, tmp_path / "nested.safetensors", "model.diffusion_model.")
    assert load_transformer(path).tensors.keys() == tensors.keys()


def test_round_trip_through_every_format(small, tmp_path):
    """gemlite -> comfy -> mlx -> comfy-base3 -> gemlite -> diffusers: identical codes, scales and dense tensors."""
    base3 = "comfy-base3" if small.bits == 2 else "comfy"
    first = names.to_comfyui(load_transformer(small.gemlite).tensors)
    path = small.gemlite
    for i, target in enumerate(("comfy", "mlx", base3, "gemlite", "diffusers")):
        destination = tmp_path / (f"{i}.safetensors" if target.startswith("comfy") else str(i))
        save_transformer(load_transformer(path), destination, target)
        path = destination
        tensors = names.to_comfyui(load_transformer(path).tensors)
        assert tensors.keys() == first.keys()
        for name, tensor in first.items():
            same = equal(tensor, tensors[name]) if is_packed(tensor) else torch.equal(tensor, tensors[name])
            assert same, (target, name)
    again = torch.load(tmp_path / "3" / "state_dict.pt", weights_only=True)
    original = torch.load(small.gemlite / "state_dict.pt", weights_only=True)
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.items())


def test_saved_source_survives(small, tmp_path):
    save_transformer(load_transformer(small.mlx), tmp_path / "a.safetensors", "comfy")
    assert load_transformer(tmp_path / "a.safetensors").source == "bonsai-mlx"


def test_source_of_a_relative_path(small, monkeypatch):
    monkeypatch.chdir(small.mlx.parent)
    assert load_transformer(Path(small.mlx.name)).source == load_transformer(small.mlx).source == "bonsai-mlx"


def test_source_of_our_own_download(small, tmp_path):
    folder = shutil.copytree(small.mlx.parent, tmp_path / "bonsai")
    (folder / "bonsai-download.json").write_text('{"repository": "prism-ml/x", "revision": "main", "commit": "abc"}')
    assert load_transformer(folder / small.mlx.name).source == "prism-ml/x@abc"
    (folder / "bonsai-download.json").write_text("[")
    assert load_transformer(folder / small.mlx.name).source == "bonsai"


def test_dense_weights_that_do_not_say_their_codes(small, tmp_path):
    """A group of zeros, and a negative scale: lossless in any format, but another code in a dense one."""
    model = load_transformer(small.mlx)
    name, weight = next((name, tensor) for name, tensor in model.tensors.items() if is_packed(tensor))
    codes, scale = unwrap(weight).codes.clone(), unwrap(weight).scale.clone()
    if small.bits == 2:
        codes[0, :32] = 0b01010101
    scale[1, 0] *= -1
    model.tensors[name] = packed_weight(codes, scale, small.bits)
    save_transformer(model, tmp_path / "dense", "diffusers")
    assert torch.equal(dense64(load_transformer(tmp_path / "dense").tensors[name]), dense64(model.tensors[name]))


def test_mlx_text_encoder(tmp_path):
    import mlx.core as mx

    model_files.write_mlx_text_encoder(model_files.text_model(), tmp_path / "encoder")
    stored = mx.load(str(tmp_path / "encoder" / "model.safetensors"))
    loaded = load_text_encoder(tmp_path / "encoder")
    assert loaded.format == "mlx" and is_packed(loaded.tensors["model.embed_tokens.weight"])
    for name, tensor in loaded.tensors.items():
        if is_packed(tensor):
            layer = name.removesuffix(".weight")
            scales, biases = (stored[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            dense = mx.dequantize(stored[name], scales, biases, 64, 4)
            assert torch.allclose(tensor.to(dtype=torch.float32).dequantize(), torch.from_numpy(_numpy(dense)),
                                  rtol=1e-6, atol=1e-7), name


def test_hqq_text_encoder(tmp_path):
    """Equal to hqq's own dequantization, bit for bit in the dtype hqq computes in."""
    model = model_files.write_hqq_text_encoder(tmp_path / "encoder")
    loaded = load_text_encoder(tmp_path / "encoder")
    assert loaded.format == "hqq"
    packed = {name: tensor for name, tensor in loaded.tensors.items() if is_packed(tensor)}
    assert len(packed) == 7 * model_files.TEXT["num_hidden_layers"]
    for name, tensor in packed.items():
        theirs = model.get_submodule(name.removesuffix(".weight")).dequantize()
        params = unwrap(tensor)
        codes = (dense64(tensor) / params.scale.double().repeat_interleave(64, 1)
                 + params.shift.double().repeat_interleave(64, 1)).round().half()
        half = (codes - params.shift.repeat_interleave(64, 1)) * params.scale.repeat_interleave(64, 1)
        assert torch.equal(half, theirs), name
        assert torch.allclose(dense64(tensor), theirs.double(), rtol=2e-3, atol=2e-3), name


def test_dense_text_encoder(tmp_path):
    model = model_files.text_model()
    model.save_pretrained(tmp_path / "encoder")
    loaded = load_text_encoder(tmp_path / "encoder")
    assert loaded.format == "dense"
    assert all(torch.equal(tensor, model.state_dict()[name.removeprefix("model.")])
               for name, tensor in loaded.tensors.items())


def _numpy(array):
    import numpy as np

    return np.array(array)
