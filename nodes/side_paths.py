"""ComfyUI's patches as side paths (``ops/side_paths.py``).

LoRA (also a LoCon on a Linear), LoKr, LoHa, their DoRAs and plain differences are translated. Every other kind (GLoRA,
OFT, BOFT, merges) becomes the difference that it makes to this one weight: ComfyUI's own code computes it in FP32 each
time it is needed, and it is multiplied beside the weight.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.lora
import torch
from comfy.weight_adapter import (
    BOFTAdapter,
    GLoRAAdapter,
    LoHaAdapter,
    LoKrAdapter,
    LoRAAdapter,
    OFTAdapter,
    WeightAdapterBase,
)

from ..loaders.lora import adapter
from ..ops import side_paths as ops
from ..ops.side_paths import SidePath

#: (strength, value, strength of the weight itself, offset or None, function or None), as ``ModelPatcher`` stores them.
#: An offset is (dimension, first row, number of rows).
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]

#: What the weights of ComfyUI's adapters are, in order; what has no name is of convolutions, or changes the shape.
_WEIGHTS: dict[type, tuple[str, ...]] = {
    LoRAAdapter: ("lora_up.weight", "lora_down.weight", "alpha", "", "dora_scale", ""),
    LoKrAdapter: ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "", "dora_scale"),
    LoHaAdapter: ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "", "", "dora_scale"),
}


class Adapters(NamedTuple):
    """What one layer has attached: ``paths``, made for these ``patches`` on this ``device``."""

    device: torch.device
    patches: tuple[Patch, ...]
    paths: tuple[SidePath, ...]

    def made_for(self, device: torch.device, patches: Sequence[Patch]) -> bool:
        # Compare by identity: == on tensors is elementwise, and ComfyUI never mutates a patch.
        return self.device == device and [*map(id, self.patches)] == [*map(id, patches)]


def translated(patch: Patch) -> ops.Patch | None:
    """What ``patch`` is in our terms; None for a kind that only ComfyUI knows."""
    match patch:
        case strength, value, 1.0, None | (0, _, _) as offset, None:
            group = _group(value)
            change = adapter(group)
            return change and ops.Patch(change, strength, offset and offset[1:], group.get("dora_scale"))
    return None


def _group(value: Any) -> dict[str, Any]:
    """The tensors, and alpha, in the value of a patch; without names for what only ComfyUI knows."""
    match value:
        case ("diff", (torch.Tensor() as difference,)):
            return {"diff": difference}
        case WeightAdapterBase(weights=weights) if len(weights) == len(names := _WEIGHTS.get(type(value), ())):
            return {name: part for name, part in zip(names, weights, strict=True) if part is not None}
    return {}


def fits(patch: Patch, shape: tuple[int, ...]) -> bool:
    """Whether ``patch`` can change a weight of ``shape``, as far as its kind is known."""
    known, rows = translated(patch), patch[3][2] if patch[3] else shape[0]
    match patch[1]:
        case OFTAdapter(weights=(blocks, *_)) | BOFTAdapter(weights=(blocks, *_)):
            return math.prod(blocks.shape[-3:-1]) == rows
        case GLoRAAdapter(weights=(_, _, b1, b2, *_)):
            return {rows, *shape[1:]} <= {*b1.shape, *b2.shape}
    return known is None or known.fits(shape)


def side_paths(patches: Sequence[Patch], key: str, device: torch.device, lookup: bool = False) -> tuple[SidePath, ...]:
    """The side paths, in order, that add the effect of ``patches``, all of which fit, on the weight ``key``.

    ``lookup``: the weight is an Embedding's. Factors are copied to ``device`` here; whole matrices (plain differences
    and merges) stay where they are until they are used.
    """
    there = tuple((patch[0], _moved(patch[1], device), *patch[2:]) for patch in patches)
    known = [found for patch in there if (found := None if lookup and patch[3] else translated(patch))]
    # What only ComfyUI knows may scale or replace what the ones before have made, so all of them count, in order.
    return ops.side_paths(known) if len(known) == len(there) else (ops.Difference(partial(_patched, there, key)),)


def factors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of the value of a patch that :func:`side_paths` copies to the device."""
    if isinstance(value, WeightAdapterBase):
        yield from (part for part in value.weights if isinstance(part, torch.Tensor))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, WeightAdapterBase):
        # Copied, not made anew: newer ComfyUIs give their adapters more fields.
        value = copy.copy(value)
        value.weights = tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in value.weights)
    return value


def _patched(patches: Sequence[Patch], key: str, dense: torch.Tensor) -> torch.Tensor:
    """What ComfyUI makes of ``dense``. Raises ValueError where that has another shape."""
    options = {"intermediate_dtype": torch.float32, "original_weights": {key: [(dense, None)]}}
    # Other node packs replace this function by that of an older ComfyUI, which takes less.
    taken = inspect.signature(comfy.lora.calculate_weight).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        options = {name: options[name] for name in options.keys() & {parameter.name for parameter in taken}}
    patched = comfy.lora.calculate_weight(list(patches), dense.clone(), key, **options)
    if patched.shape != dense.shape:
        raise ValueError(f"A LoRA changes the shape of {key} from {tuple(dense.shape)} to {tuple(patched.shape)}, "
                         "which this model cannot follow; remove that LoRA.")
    return patched
