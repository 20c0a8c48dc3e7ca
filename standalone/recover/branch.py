"""The factors that are trained, and the LoRA that they are."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ...loaders import Lora
from ...loaders.klein import KleinConfig, comfyui_shapes, layers
from ...loaders.lora_names import Target
from ...ops.packed import is_packed

#: Tensors by ``<ComfyUI's layer>.lora_down.weight`` (rank, in) and ``<ComfyUI's layer>.lora_up.weight`` (out, rank).
Factors = Mapping[str, torch.Tensor]
_DOWN, _UP = ".lora_down.weight", ".lora_up.weight"


def new(transformer: torch.nn.Module, config: KleinConfig, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors in FP32 for every packed linear of diffusers' ``transformer``, which change nothing yet: the upper ones
    are zero."""
    chance, shapes, factors = torch.Generator().manual_seed(seed), comfyui_shapes(config), {}
    for name, (sources, _) in layers(config.num_layers, config.num_single_layers).items():
        if is_packed(transformer.get_parameter(sources[0])):
            rows, columns = shapes[name]
            layer = name.removesuffix(".weight")
            factors[f"{layer}{_DOWN}"] = torch.randn(rank, columns, generator=chance) * columns**-0.5
            factors[f"{layer}{_UP}"] = torch.zeros(rows, rank)
    return factors


def lora(factors: Factors, metadata: Mapping[str, str] | None = None) -> Lora:
    """``factors``, which are not copied, as a LoRA of alpha equal to its rank."""
    found = Lora(Path("recovery"), dict(metadata or {}))
    for name, up in factors.items():
        if name.endswith(_UP):
            layer = name.removesuffix(_UP)
            found.groups[Target(f"diffusion_model.{layer}", layer)] = {
                "lora_down.weight": factors[f"{layer}{_DOWN}"], "lora_up.weight": up,
                "alpha": torch.tensor(float(up.shape[1]))}
    return found
