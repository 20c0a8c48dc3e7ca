"""The trained miniature in ComfyUI: its MODEL through the real sampler, its LoRA through the real loader.

The host fixes the sizes of the text encoder and of the VAE, so conditioning and decoding are diffusers'. With
UPDATE_PICTURES=1 the pictures of the README are written anew.
"""

import os
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from PIL import Image

from bonsai_image.loaders import load_transformer
from bonsai_image.miniature import demo
from bonsai_image.miniature.train.measure import describe, held_out_scenes, score
from bonsai_image.miniature.train.scenes import COLOURS, Scene, draw
from bonsai_image.nodes import models as host_models
from bonsai_image.ops import Setting, is_packed, unwrap
from bonsai_image.standalone import models
from bonsai_image.tests.support.miniature_in_comfyui import CPU, REPOSITORY, SIDE, STEPS, Ends, sampled

LORA = demo.MINIATURE / "blue_pot_lora.safetensors"
SCENES = held_out_scenes(24, seed=6)
IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def ends():
    return Ends()


@pytest.fixture(scope="module", params=["ternary", "binary"])
def model(request):
    return host_models.load_model(str(demo.MINIATURE / demo.VARIANTS[request.param]), "fp32")


@pytest.fixture(scope="module")
def ternary():
    return host_models.load_model(str(demo.MINIATURE / demo.VARIANTS["ternary"]), "fp32")


def with_lora(model, strength: float):
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(LORA), safe_load=True), strength,
                                         0.0)[0]


def keep(name: str, rows: list[torch.Tensor]) -> None:
    """Write a grid of pictures as the README's, if asked to."""
    if os.environ.get("UPDATE_PICTURES"):
        grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        Image.fromarray(((grid + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(IMAGES / name)


def test_the_sampler_draws_what_the_prompts_say(ends, model):
    right = score(SCENES, sampled(ends, model, [scene.caption() for scene in SCENES]))
    assert right["colour"] >= 0.9 and right["shape"] >= 0.85 and right["background"] == 1, right


def test_the_sampler_and_diffusers_draw_the_same(ends, ternary):
    """From the host's noise, in FP32."""
    prompts = [scene.caption() for scene in SCENES[:4]]
    noise = torch.randn(4, 128, 8, 8, generator=torch.manual_seed(0))
    ends.pipeline.register_modules(transformer=models.transformer_module(
        load_transformer(REPOSITORY.transformer), CPU, torch.float32, Setting("torch")))
    ends.pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = ends.pipeline(prompt_embeds=ends.encode(prompts), latents=noise, height=SIDE,
                                 width=SIDE, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent").images
        expected = ends.vae.decode(expected, return_dict=False)[0].clamp(-1, 1)
    assert (sampled(ends, ternary, prompts) - expected).abs().max() < 1e-3


def test_a_reference_latent_is_edited(ends, ternary):
    scenes = [Scene("star", "red", "white", "at the top left"), Scene("bonsai", "brown", "cream")]
    rows = []
    for scene in scenes:
        reference = draw(scene)[None]
        edits = [scene.edit(colour) for colour in COLOURS if colour != scene.colour]
        pictures = sampled(ends, ternary, [words for words, _ in edits], reference_latents=[ends.latent(reference)])
        right = score([wanted for _, wanted in edits], pictures)
        assert right["colour"] >= 0.7 and right["shape"] >= 0.85 and right["background"] == 1, right
        rows.append(torch.cat([reference, pictures[:5]]))
    keep("edit.png", rows)


def test_a_lora_changes_one_thing(ends, ternary):
    """Every pot turns blue; leaves and background stay; strength 0 and the MODEL itself are as before."""
    codes = {name: unwrap(tensor).codes.clone() for name, tensor in ternary.model.diffusion_model.named_parameters()
             if is_packed(tensor)}
    scenes = [Scene("bonsai", colour, background, leaves=leaves) for colour, background, leaves in (
        ("red", "white", "green"), ("yellow", "grey", "pink"), ("green", "cream", "orange"),
        ("orange", "black", "green"), ("purple", "white", "red"), ("brown", "cream", "pink"))]
    prompts = [scene.caption() for scene in scenes]
    plain, blue = (sampled(ends, with_lora(ternary, strength), prompts) for strength in (0.0, 1.0))
    assert torch.equal(plain, sampled(ends, ternary, prompts))
    before, after = [describe(picture) for picture in plain], [describe(picture) for picture in blue]
    assert sum(seen["colour"] == scene.colour for seen, scene in zip(before, scenes, strict=True)) >= 5
    assert sum(seen["colour"] == "blue" for seen in after) >= 5
    for name in ("leaves", "background", "shape"):
        assert sum(a[name] == b[name] for a, b in zip(before, after, strict=True)) >= 5
    for name, tensor in ternary.model.diffusion_model.named_parameters():
        assert name not in codes or torch.equal(unwrap(tensor).codes, codes[name])
    keep("lora.png", [plain, blue])
