"""A LoRA for the miniature: whatever the prompt asks for, the bonsai's pot is blue."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch.nn.utils import parametrize

from bonsai_image.loaders.klein import is_packable
from bonsai_image.miniature.train import text
from bonsai_image.miniature.train.scenes import COLOURS, LEAVES, Scene, draw, random_scene
from bonsai_image.miniature.train.transformer import train_transformer

COLOUR = "blue"
RANK = 4
_PICTURES = 400


class LowRank(torch.nn.Module):
    """A parametrisation: the weight plus ``up @ down``."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(RANK, columns) * columns**-0.5)
        self.up = torch.nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


@torch.no_grad()
def _data(vae: AutoencoderKLFlux2, encoder: torch.nn.Module, tokenizer, signal: torch.Tensor) -> dict:
    """Bonsais with blue pots under prompts of every colour, and, so that nothing else changes, other scenes."""
    source = random.Random(7)
    asked, shown = [], []
    for i in range(_PICTURES):
        if i % 5 < 3:
            scene = Scene("bonsai", source.choice(list(COLOURS)), random_scene(source).background,
                          leaves=source.choice(LEAVES))
            drawn = replace(scene, colour=COLOUR)
        else:
            scene = drawn = random_scene(source)
        asked.append(scene.caption())
        shown.append(draw(drawn, source))
    latents = torch.nn.functional.pixel_unshuffle(vae.encode(torch.stack(shown)).latent_dist.mean, 2)
    spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return {"latents": (latents - vae.bn.running_mean[:, None, None]) / spread[:, None, None], "signal": signal,
            "text": text.encode(encoder, tokenizer, asked), "caption": torch.arange(_PICTURES)}


def train_lora(folder: Path, model: Flux2Transformer2DModel, vae: AutoencoderKLFlux2, encoder: torch.nn.Module,
               tokenizer, signal: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Train a LoRA over ``model``, which stays as it is but for the parametrisation. Returns the LoRA's tensors, in
    diffusers' names."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    added = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and is_packable(f"{name}.weight"):
            added[name] = LowRank(*module.weight.shape)
            parametrize.register_parametrization(module, "weight", added[name])
    train_transformer(folder, "lora", model, _data(vae, encoder, tokenizer, signal), steps, (0.0, 2e-3))
    result = {}
    for name, low_rank in added.items():
        result[f"transformer.{name}.lora_A.weight"] = low_rank.down.detach().bfloat16().contiguous()
        result[f"transformer.{name}.lora_B.weight"] = low_rank.up.detach().bfloat16().contiguous()
    return result
