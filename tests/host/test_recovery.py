"""A LoRA of ``bonsai-image recover`` in ComfyUI: read by its own loader, at the noise levels of its own scheduler."""

import logging

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_flux import Flux2Scheduler

from bonsai_image.loaders import load_lora, load_transformer, save_lora
from bonsai_image.miniature import demo
from bonsai_image.nodes import models as host_models
from bonsai_image.ops import Setting
from bonsai_image.standalone import lora, models
from bonsai_image.standalone.recover.sampling import Sampler
from bonsai_image.standalone.recover.student import as_lora, new_factors
from bonsai_image.tests.support.comfyui_server import ROOT
from bonsai_image.tests.support.miniature_in_comfyui import CPU, REPOSITORY, SIDE, STEPS, Ends, sampled

PROMPTS = ["a large red star on the left on a white background", "three blue circles on a cream background"]


@pytest.mark.parametrize("variant", ["ternary", "binary"])
@torch.no_grad()
def test_the_loader_applies_what_was_trained(variant, tmp_path, caplog):
    packed = load_transformer(demo.MINIATURE / demo.VARIANTS[variant])
    transformer = models.transformer_module(packed, CPU, torch.float32, Setting("torch"))
    chance = torch.Generator().manual_seed(1)
    factors = {name: each if "down" in name else torch.randn(each.shape, generator=chance)
               for name, each in new_factors(transformer, packed.config, 8, 0).items()}
    save_lora(as_lora({name: each.bfloat16() for name, each in factors.items()}), tmp_path / "lora.safetensors")
    model, ends = host_models.load_model(str(packed.path), "fp32"), Ends()
    with caplog.at_level(logging.WARNING):
        changed = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"), safe_load=True), 1.0, 0.0)[0]
    assert not caplog.records

    sampler = Sampler(models.scheduler(REPOSITORY.scheduler), SIDE, SIDE, STEPS, CPU)
    noise = torch.randn(len(PROMPTS), 128, 8, 8, generator=torch.manual_seed(0)).flatten(2).mT

    def drawn() -> torch.Tensor:
        end = [*sampler.trajectory(transformer, noise, ends.encode(PROMPTS))][-1]
        return ends.vae.decode(sampler.pictured(end, ends.vae), return_dict=False)[0].clamp(-1, 1)

    without = drawn()
    with lora.applied(lora.hooks(transformer, [(load_lora(tmp_path / "lora.safetensors"), 1.0)])):
        expected = drawn()
    assert (expected - without).abs().mean() > 0.02
    assert (sampled(ends, changed, PROMPTS) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_levels_are_those_of_the_scheduler(steps, side):
    sigmas = Flux2Scheduler.execute(steps, side, side).result[0]
    assert torch.allclose(Sampler(models.scheduler(None), side, side, steps, CPU).sigmas, sigmas, atol=1e-6)
    stated = ", ".join(["1", *(f"{sigma:.4f}" for sigma in sigmas[1:-1].tolist())])
    assert f"**{stated}**" in (ROOT / "example_workflows" / "4 Few steps.json").read_text(encoding="utf-8")
