"""Which steps of ComfyUI the MLX transformer takes, and the reason for those that it does not."""

import pytest

from bonsai_image.nodes.mlx_step import refusal


@pytest.mark.parametrize(("step", "reason"), [
    ({}, None),
    ({"options": {"sigmas": 1, "uuids": [], "cond_or_uncond": [0], "sample_sigmas": 1}}, None),
    ({"options": {"wrappers": {"diffusion_model": {}}, "callbacks": {}, "prefetch_dynamic_vbars": False}}, None),
    ({"options": {"patches": {}, "patches_replace": {}}}, None),
    ({"options": {"patches": {"attn1_patch": []}, "patches_replace": {"dit": {}}}}, None),
    ({"options": {"rope_options": {"scale_x": 2.0}}}, None),
    ({"inputs": {"guidance": 1, "y": 1, "ref_latents_method": "index", "control": None}}, None),
    ({"options": {"patches": {"attn1_patch": [len]}}}, "attn1_patch"),
    ({"options": {"patches": {"post_input": [len]}}}, "post_input"),
    ({"options": {"patches_replace": {"dit": {("double_block", 0): len}}}}, "dit"),
    ({"options": {"optimized_attention_override": len}}, "optimized_attention_override"),
    ({"options": {"an option of next year": 1}}, "an option of next year"),
    ({"options": {("a", 1): 1}}, "('a', 1)"),
    ({"inputs": {"control": 1}}, "control"),
    ({"inputs": {"attention_mask": 1}}, "attention_mask"),
    ({"inputs": {"timestep_zero_index": 1}}, "timestep_zero_index"),
    ({"inputs": {"an input of next year": 1}}, "an input of next year"),
    ({"patched": 80}, "80 weights"),
    ({"changed": ["img_in"]}, "img_in"),
    ({"hooks": True}, "hooks"),
    ({"managed": True}, "dynamic VRAM"),
    ({"gradient": True}, "gradient"),
])
def test_refusals(step, reason):
    refused = refusal(**{"options": {}, "inputs": {}, "patched": 0, **step})
    assert refused is None if reason is None else reason in refused
