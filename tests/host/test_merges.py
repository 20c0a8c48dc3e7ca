"""Merging two Bonsai models, and what a patched one refuses."""

import comfy.hooks
import comfy.lora
import comfy.sd
import pytest
import torch

from bonsai_image.loaders import load_transformer
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.nodes import models
from bonsai_image.ops.packed import is_packed
from bonsai_image.tests.support.adapters import Maker, with_lora
from bonsai_image.tests.support.reference import dense64, relative
from bonsai_image.tests.support.sampling import host_forward


def test_merging_two_bonsai_models_works_densely(transformer, dense_model, tensors, inputs, tmp_path):
    """ModelMergeSimple's way: half of one, half of the other; then the merged model drops the merge again."""
    from bonsai_image.loaders import Transformer, save_transformer
    from bonsai_image.tests.support import random_model

    config = load_transformer(transformer).config
    path = tmp_path / "other.safetensors"
    other = random_model.random_transformer(config, 2, torch.Generator().manual_seed(9))
    save_transformer(Transformer(path, "comfy", other, config), path, "comfy")
    first, second = models.load_model(str(transformer), "fp32"), models.load_model(str(path), "fp32")
    dense_second = comfy.sd.load_diffusion_model_state_dict(
        {name: dense64(t).float() if is_packed(t) else t.float() for name, t in to_comfyui(other).items()})

    def merge(one, two):
        merged = one.clone()
        for key, value in two.get_key_patches("diffusion_model.").items():
            merged.add_patches({key: value}, 0.5, 0.5)
        return merged

    expected = host_forward(merge(dense_model, dense_second), inputs)
    assert relative(host_forward(merge(first, second), inputs), expected) < 1e-4
    assert relative(expected, host_forward(dense_model, inputs)) > 1e-2
    assert relative(host_forward(first, inputs), host_forward(dense_model, inputs)) < 1e-5


def _bypassed(model, file):
    return comfy.sd.load_bypass_lora_for_models(model, None, file, 1.0, 0.0)[0]


def _hooked(model, file):
    patched = model.clone()
    hooks = comfy.hooks.create_hook_lora(file, 1.0, 0.0)
    patched.add_hook_patches(hooks.hooks[0], comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model)))
    return patched


def _wrapped(model, file):
    patched = model.clone()
    patched.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * 2)
    return patched


@pytest.mark.parametrize("change", [with_lora, _bypassed, _hooked, _wrapped])
def test_save_node_refuses_what_it_cannot_store(packed_model, tensors, change):
    from bonsai_image.nodes import definitions as nodes

    with pytest.raises(ValueError, match=r"LoRA|weight function"):
        nodes.BonsaiSaveModel.execute(change(packed_model, Maker(tensors).file("lora")), "x", "packed")
