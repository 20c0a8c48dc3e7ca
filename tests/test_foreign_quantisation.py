"""Quantizations that ComfyUI reads itself, in the layouts of the files that Comfy-Org publishes: refused by name, with
ComfyUI's own loader as the remedy."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import load_text_encoder, load_transformer
from bonsai_image.loaders.klein import comfyui_shapes, is_packable
from bonsai_image.loaders.qwen3 import qwen3_shapes
from bonsai_image.tests.support.random_model import _KLEIN, _TEXT
from bonsai_image.tests.support.sound_files import refusal

FP8 = torch.float8_e4m3fn
#: Format of the tag (none in older files) -> dtype and columns per element of the weight, and the tensors beside it.
LAYERS = {
    None: (FP8, 1, {}),
    "scaled": (FP8, 1, {"scale_weight": torch.ones(())}),
    "float8_e4m3fn": (FP8, 1, {"weight_scale": torch.ones(())}),
    "float8_e5m2": (torch.float8_e5m2, 1, {"weight_scale": torch.ones(())}),
    "nvfp4": (torch.uint8, 2, {"weight_scale": torch.ones(128, 8).to(FP8), "weight_scale_2": torch.ones(())}),
    "mxfp8": (FP8, 1, {"weight_scale": torch.ones(128, 4, dtype=torch.uint8)}),
    "int8_tensorwise": (torch.int8, 1, {"weight_scale": torch.ones(128, 1)}),
    "convrot_w4a4": (torch.int8, 2, {"weight_scale": torch.ones(128, 1)}),
}


def quantized(shapes, packed, form, prefix=""):
    """What such a file holds of a model of these shapes, ones."""
    dtype, per_column, beside = LAYERS[form]
    tensors = {}
    for name, shape in shapes.items():
        if not packed(name) or len(shape) == 1:
            tensors[prefix + name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        layer = prefix + name.removesuffix(".weight")
        tensors[f"{layer}.weight"] = torch.ones(shape[0], shape[1] // per_column, dtype=torch.uint8).view(dtype)
        tensors |= {f"{layer}.{key}": value.clone() for key, value in beside.items()}
        if form not in (None, "scaled"):
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": form}).encode()),
                                                           dtype=torch.uint8)
    return tensors | ({"scaled_fp8": torch.zeros(2 * bool(prefix), dtype=FP8)} if form == "scaled" else {})


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize(("load", "shapes", "packed", "prefix", "loader"), [
    (load_text_encoder, qwen3_shapes(_TEXT), lambda name: "layers" in name, "", "ComfyUI's own Load CLIP, type flux2"),
    (load_transformer, comfyui_shapes(_KLEIN), is_packable, "", "ComfyUI's own Load Diffusion Model"),
    (load_transformer, comfyui_shapes(_KLEIN), is_packable, "model.diffusion_model.", "Load Diffusion Model"),
], ids=["text encoder", "diffusion model", "checkpoint"])
def test_comfyuis_own_loader_is_named(load, shapes, packed, prefix, loader, form, tmp_path):
    save_file(quantized(shapes, packed, form, prefix), tmp_path / "model.safetensors")
    said = refusal(load, tmp_path / "model.safetensors")
    stored = LAYERS[form][0]
    assert f"load it with {loader}" in said or loader in said
    assert (form if form not in (None, "scaled") else str(stored).removeprefix("torch.")) in said
