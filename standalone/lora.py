"""LoRAs for diffusers' transformer: hooks add the side paths of ``ops/side_paths.py`` to the results of its layers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial

import torch

from ..loaders import Lora, ModelFileError
from ..loaders.klein import KleinConfig, comfyui_shapes, layers
from ..loaders.names import FINAL_MODULATION
from ..ops.side_paths import Difference, Patch, SidePath, changed, dense, side_paths

#: A module, and what turns (module, inputs, result) into its result with LoRAs.
Hooks = list[tuple[torch.nn.Module, Callable]]


def hooks(transformer: torch.nn.Module, loras: Sequence[tuple[Lora, float]]) -> Hooks:
    """What adds ``loras``, each at its strength, to ``transformer``. Warns about the parts of a file without effect.

    Raises ModelFileError where nothing of it fits, and ValueError for a transformer without layers.
    """
    if not hasattr(transformer, "transformer_blocks"):
        raise ValueError("A LoRA needs the layers one by one, which MLX joins here; choose another --backend.")
    config = KleinConfig(**{field.name: transformer.config[field.name] for field in fields(KleinConfig)})
    shapes, patches = comfyui_shapes(config), dict[str, list[Patch]]()
    for lora, strength in loras:
        found = lora.fitting(shapes, strength, transformer.device)
        problems = lora.without_effect(sum(map(len, found.values())))
        if not found:
            raise ModelFileError(lora.path, "a LoRA that fits this model", problems[0],
                                 "choose one made for FLUX.2 Klein 4B")
        for problem in problems:
            logging.warning("Bonsai Image: %s: %s.", lora.path, problem)
        for layer, more in found.items():
            patches.setdefault(layer, []).extend(more)
    return [hook for name, (sources, _) in layers(config.num_layers, config.num_single_layers).items()
            if (attached := patches.get(name.removesuffix(".weight")))
            for hook in _on_layer(transformer, name.removesuffix(".weight"), sources, attached)]


def _on_layer(transformer: torch.nn.Module, layer: str, sources: Sequence[str], patches: list[Patch]) -> Iterator:
    """The hooks of one of ComfyUI's layers, which is one of diffusers' or three."""
    modules = [transformer.get_submodule(source.removesuffix(".weight")) for source in sources]
    if modules[0].weight.ndim == 1:
        yield modules[0], partial(_scaled, patches)
        return
    n = modules[0].weight.shape[0]
    half = n // 2 if layer == FINAL_MODULATION else 0
    for i, module in enumerate(modules):
        if len(modules) > 1 and any(patch.magnitude is not None for patch in patches):
            yield module, partial(_added, (Difference(partial(_changed_part, patches, modules, i * n)),), 0)
        else:
            within = [part for patch in patches if (part := patch.within(i * n, n))] if len(modules) > 1 else patches
            yield module, partial(_added, side_paths(within), half)


def _changed_part(patches: list[Patch], modules: list[torch.nn.Module], first: int, weight: torch.Tensor):
    """Rows from ``first`` of joined weights, changed: the norms of a DoRA's columns are those of all rows."""
    joined = torch.cat([dense(module.weight) for module in modules])
    return changed(patches, joined).narrow(0, first, len(weight))


def _scaled(patches: list[Patch], module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor):
    """The result of a norm with differences of its weight."""
    weight = module.weight.float() + sum(patch.strength * patch.adapter.matrix() for patch in patches)
    return torch.nn.functional.rms_norm(inputs[0], module.normalized_shape, weight.to(module.weight.dtype), module.eps)


def _added(paths: Sequence[SidePath], half: int, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...],
           result: torch.Tensor) -> torch.Tensor:
    """``result`` with ``paths``. With ``half`` of its rows, ComfyUI has the two halves the other way round."""
    # Autograd forbids changing the result of a custom operator in place.
    y = result.roll(half, -1) if half else result.clone() if torch.is_grad_enabled() else result.contiguous()
    for path in paths:
        path.add(inputs[0], y, module.weight.roll(half, 0) if half else module.weight)
    return y.roll(half, -1) if half else y


@contextmanager
def applied(hooks: Hooks) -> Iterator[None]:
    """Inside, the transformer computes with the LoRAs of ``hooks``."""
    with ExitStack() as registered:
        for module, hook in hooks:
            registered.enter_context(module.register_forward_hook(hook))
        yield
