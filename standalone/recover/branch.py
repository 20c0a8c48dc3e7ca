"""The LoRA that is trained: low-rank factors beside the packed linears, in ComfyUI's naming."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from ...loaders.klein import KleinConfig, is_packable, layers
from ...ops.packed import is_packed

#: Tensors by ``<layer>.lora_down.weight`` (rank, in) and ``<layer>.lora_up.weight`` (out, rank).
Factors = Mapping[str, torch.Tensor]
_PREFIX, _DOWN, _UP = "diffusion_model.", ".lora_down.weight", ".lora_up.weight"


def _layers(transformer: torch.nn.Module, config: KleinConfig) -> dict[str, list[torch.nn.Module]]:
    """ComfyUI's name of every packed linear -> the one or three modules of diffusers that it is."""
    known = layers(config.num_layers, config.num_single_layers)
    found = {ours.removesuffix(".weight"): [transformer.get_submodule(each.removesuffix(".weight")) for each in theirs]
             for ours, (theirs, _) in known.items() if is_packable(ours)}
    return {name: modules for name, modules in found.items() if is_packed(modules[0].weight)}


def new(transformer: torch.nn.Module, config: KleinConfig, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors in FP32 that change nothing yet: the upper ones are zero."""
    chance, factors = torch.Generator().manual_seed(seed), {}
    for name, modules in _layers(transformer, config).items():
        columns = modules[0].in_features
        factors[f"{name}{_DOWN}"] = torch.randn(rank, columns, generator=chance) * columns**-0.5
        factors[f"{name}{_UP}"] = torch.zeros(sum(module.out_features for module in modules), rank)
    return factors


@contextmanager
def applied(transformer: torch.nn.Module, config: KleinConfig, factors: Factors) -> Iterator[None]:
    """Adds ``up @ down @ x`` to the result of every layer, in the dtype of its activations."""
    def beside(down: torch.Tensor, up: torch.Tensor, part: int):
        def add(module, args, result):
            rows = up[part * module.out_features:(part + 1) * module.out_features]  # a view of what training changes
            return result + linear(linear(args[0], down.to(result.dtype)), rows.to(result.dtype))

        return add

    hooks = [module.register_forward_hook(beside(factors[f"{name}{_DOWN}"], factors[f"{name}{_UP}"], part))
             for name, modules in _layers(transformer, config).items() for part, module in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exported(factors: Factors, rank: int) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file that ComfyUI's loaders read, in BF16."""
    tensors = {f"{_PREFIX}{name}": tensor.to(torch.bfloat16) for name, tensor in factors.items()}
    return tensors | {f"{_PREFIX}{name.removesuffix(_UP)}.alpha": torch.tensor(float(rank))
                      for name in factors if name.endswith(_UP)}
