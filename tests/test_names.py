"""The two naming conventions of FLUX.2 Klein, and the way between them: nothing is lost, packed weights stay packed."""

from pathlib import Path

import pytest
import torch

from bonsai_image.loaders import ModelFileError, klein, names
from bonsai_image.loaders.klein import comfyui_shapes, diffusers_shapes
from bonsai_image.ops.packed import equal, is_packed, packed_weight, unwrap
from bonsai_image.tests.support.random_model import random_transformer
from bonsai_image.tests.support.reference import dense64
from bonsai_image.tests.support.sound_files import KLEIN

QKV, Q, K, V = "double_blocks.0.img_attn.qkv.weight", *(f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv")
FINAL, NORM_OUT = "final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight"
CODES, SCALE, SHIFT = torch.arange(64, dtype=torch.uint8).view(4, 16), torch.rand(4, 1), torch.rand(4, 1)


@pytest.fixture(scope="module")
def diffusers() -> dict[str, torch.Tensor]:
    return random_transformer(KLEIN, 2, torch.Generator().manual_seed(0))


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return equal(one, other) if is_packed(one) and is_packed(other) else torch.equal(one, other)


def test_there_and_back(diffusers):
    comfyui = names.to_comfyui(diffusers)
    assert shapes(comfyui) == comfyui_shapes(KLEIN) and shapes(diffusers) == diffusers_shapes(KLEIN)
    assert not klein.is_comfyui(diffusers) and names.to_diffusers(diffusers) is diffusers
    assert klein.is_comfyui(comfyui) and names.to_comfyui(comfyui) is comfyui
    back = names.to_diffusers(comfyui)
    assert back.keys() == diffusers.keys() and all(same(tensor, back[name]) for name, tensor in diffusers.items())


@pytest.mark.parametrize(("ours", "theirs"), [
    ("img_in", "x_embedder"), ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out"),
    ("double_blocks.0.img_attn.norm.key_norm", "transformer_blocks.0.attn.norm_k"),
    ("double_blocks.0.txt_attn.norm.query_norm", "transformer_blocks.0.attn.norm_added_q"),
    ("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.linear_in"),
    ("double_blocks.0.txt_mlp.2", "transformer_blocks.0.ff_context.linear_out"),
    ("single_blocks.0.linear1", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    ("single_blocks.0.norm.key_norm", "single_transformer_blocks.0.attn.norm_k")])
def test_renamed(ours, theirs, diffusers):
    assert names.to_comfyui(diffusers)[f"{ours}.weight"] is diffusers[f"{theirs}.weight"]


def test_every_block_has_its_own_number():
    layers = klein.layers(3, 11)
    assert klein.count_blocks(layers) == (3, 11)
    assert klein.count_blocks({source: None for sources, _ in layers.values() for source in sources}) == (3, 11)
    assert layers["double_blocks.2.txt_attn.qkv.weight"] == (
        tuple(f"transformer_blocks.2.attn.add_{part}_proj.weight" for part in "qkv"), (3, 1))


def test_shift_and_scale_of_the_final_modulation_change_places(diffusers):
    scale, shift = diffusers[NORM_OUT].chunk(2)
    assert torch.equal(names.to_comfyui(diffusers)[FINAL], torch.cat((shift, scale))) and not torch.equal(scale, shift)


def test_q_k_and_v_are_joined_in_order_and_stay_packed(diffusers):
    joined = names.to_comfyui(diffusers)[QKV]
    assert is_packed(joined) and unwrap(joined).bits == 2
    assert torch.equal(dense64(joined), torch.cat([dense64(diffusers[name]) for name in (Q, K, V)]))
    split = names.to_diffusers(names.to_comfyui(diffusers))
    assert all(is_packed(split[name]) and equal(split[name], diffusers[name]) for name in (Q, K, V))
    assert unwrap(split[K]).codes.untyped_storage().data_ptr() == unwrap(split[Q]).codes.untyped_storage().data_ptr()


@pytest.mark.parametrize("form", ["affine", "zeropoint"])
def test_shifts_are_joined_and_split(form, diffusers):
    weight = packed_weight(CODES, SCALE, 4, form, SHIFT, torch.float32)
    joined = names.to_comfyui({**diffusers, Q: weight, K: weight, V: weight})
    assert torch.equal(unwrap(joined[QKV]).shift, torch.cat([SHIFT] * 3))
    assert equal(names.to_diffusers(joined)[V], weight)


def test_scales_of_several_dtypes_stay_exact(diffusers):
    """GemLite's tables are narrowed layer by layer."""
    mixed = {**diffusers, **{name: packed_weight(CODES, SCALE.to(dtype), 4, "symmetric", dtype=dtype)
                             for name, dtype in ((Q, torch.bfloat16), (K, torch.float32), (V, torch.float16))}}
    joined = names.to_comfyui(mixed)[QKV]
    assert is_packed(joined) and torch.equal(dense64(joined), torch.cat([dense64(mixed[name]) for name in (Q, K, V)]))


@pytest.mark.parametrize("other", [
    packed_weight(CODES, SCALE, 4, "affine", SHIFT), packed_weight(CODES[:, :8], SCALE, 2), torch.ones(4, 32),
    packed_weight(CODES, SCALE.repeat(1, 2), 4)], ids=["form", "bits", "dense", "group"])
def test_what_is_packed_differently_is_not_joined(other, diffusers):
    weight = packed_weight(CODES, SCALE, 4)
    assert klein.alike([weight, weight, weight]) and not klein.alike([weight, other, weight])
    with pytest.raises(ValueError, match="not packed alike"):
        names.to_comfyui({**diffusers, Q: weight, K: other, V: weight})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_and_older_names_of_norms_are_taken_away(prefix, diffusers):
    comfyui = names.to_comfyui(diffusers)
    older = {prefix + name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in comfyui.items()}
    found, inside = names.nested({**older, "vae.bn.running_mean": torch.ones(1)} if prefix else older, "transformer")
    assert found == prefix and names.normalise(Path("a"), inside) == comfyui


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(ModelFileError, match="each tensor once"):
        names.normalise(Path("a"), dict.fromkeys((*comfyui_shapes(KLEIN), "single_blocks.0.norm.key_norm.scale")))


def test_packable_are_the_linears_inside_the_blocks(diffusers):
    for tensors in (diffusers, names.to_comfyui(diffusers)):
        assert {name for name in tensors if klein.is_packable(name)} == {
            name for name, tensor in tensors.items() if is_packed(tensor)}
