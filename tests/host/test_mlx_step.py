"""Which steps of ComfyUI the MLX transformer takes, and the reason for those that it does not."""

from __future__ import annotations

import pytest

from bonsai_image.nodes.mlx_step import Step, refusal


@pytest.mark.parametrize(("step", "reason"), [
    (Step(), None),
    (Step({"sigmas": 1, "uuids": [], "cond_or_uncond": [0], "sample_sigmas": 1}), None),
    (Step({"wrappers": {"diffusion_model": {}}, "callbacks": {}, "prefetch_dynamic_vbars": False}), None),
    (Step({"patches": {}, "patches_replace": {}}), None),
    (Step({"patches": {"attn1_patch": []}, "patches_replace": {"dit": {}}}), None),
    (Step({"rope_options": {"scale_x": 2.0}}), None),
    (Step(inputs=["guidance", "y", "ref_latents_method"]), None),
    (Step({"patches": {"attn1_patch": [len]}}), "attn1_patch"),
    (Step({"patches": {"post_input": [len]}}), "post_input"),
    (Step({"patches_replace": {"dit": {("double_block", 0): len}}}), "dit"),
    (Step({"optimized_attention_override": len}), "optimized_attention_override"),
    (Step({"an option of next year": 1}), "an option of next year"),
    (Step({("a", 1): 1}), "('a', 1)"),
    (Step(inputs=["control"]), "control"),
    (Step(inputs=["attention_mask"]), "attention_mask"),
    (Step(inputs=["timestep_zero_index"]), "timestep_zero_index"),
    (Step(inputs=["an input of next year"]), "an input of next year"),
    (Step(patched=80), "80 weights"),
    (Step(changed=["img_in"]), "img_in"),
    (Step(hooks=True), "hooks"),
    (Step(managed=True), "dynamic VRAM"),
    (Step(gradient=True), "gradient"),
])
def test_refusals(step, reason):
    refused = refusal(step)
    assert refused is None if reason is None else reason in refused
