"""Side paths: the effect of patches on a weight, added to the result of its layer instead of merged into the weight.

Plain LoRAs (also a LoCon on a Linear) and, on a Linear, LoKrs stay in factored form. Every other kind (DoRA, LoHa,
GLoRA, OFT, BOFT, plain differences, merges) becomes the difference that it makes to this one weight: ComfyUI's own code
computes it in FP32 each time it is needed, and it is multiplied beside the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.lora
import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch.nn.functional import embedding, linear

from ..ops.packed import is_packed

#: (strength, value, strength of the weight itself, offset or None, function or None), as ``ModelPatcher`` stores them.
#: An offset is (dimension, first row, number of rows).
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]


class SidePath(Protocol):
    """Adds the effect of patches on one weight ``(N, K)``."""

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add it, in place, to ``y``, the contiguous result of the layer.

        Linear: ``x`` is the activations ``(..., K)`` in the dtype of ``y`` ``(..., N)``. Embedding: ``x`` is the
        indices ``(...)``, and ``y`` the rows ``(..., K)``. ``weight`` is packed or dense, on the device of ``y``, and
        is only read.
        """


@dataclass(frozen=True)
class Adapters:
    """What one layer has attached: ``paths``, made for these ``patches`` on this ``device``."""

    device: torch.device
    patches: tuple[Patch, ...]
    paths: tuple[SidePath, ...]

    def made_for(self, device: torch.device, patches: Sequence[Patch]) -> bool:
        # Compare by identity: == on tensors is elementwise, and ComfyUI never mutates a patch.
        return (self.device == device and len(self.patches) == len(patches)
                and all(a is b for a, b in zip(self.patches, patches, strict=True)))


@dataclass(frozen=True)
class LowRank:
    """LoRAs on a Linear: ``y[..., rows] += (x @ down.T * scale)[..., ranks] @ up.T`` for each of ``ups``.

    ``down`` ``(R, K)`` stacks the ranks of all; ``scale`` ``(R,)`` float32 is strength * alpha / rank for each of them.
    ``ups`` holds (first row, number of rows, first rank, ``up`` (rows, ranks)).
    """

    down: torch.Tensor
    scale: torch.Tensor
    ups: tuple[tuple[int, int, int, torch.Tensor], ...]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        hidden = linear(x, self.down.to(x.dtype)) * self.scale.to(x.dtype)
        flat, hidden = y.view(-1, y.shape[-1]), hidden.view(-1, hidden.shape[-1])
        for row, rows, rank, up in self.ups:
            flat[:, row : row + rows].addmm_(hidden[:, rank : rank + up.shape[1]], up.to(x.dtype).t())


@dataclass(frozen=True)
class LowRankRows:
    """LoRAs on an Embedding: ``y += (up[x] * scale) @ down``, with ``up`` ``(N, R)`` and the rest as in LowRank."""

    down: torch.Tensor
    scale: torch.Tensor
    up: torch.Tensor

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        hidden = embedding(x, self.up).to(y.dtype) * self.scale.to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.down.to(y.dtype))


@dataclass(frozen=True)
class Kronecker:
    """One LoKr over all of a Linear's weight, applied by ComfyUI's own ``h``."""

    adapter: LoKrAdapter
    strength: float

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        y.add_(self.adapter.h(x, y), alpha=self.strength)


@dataclass(frozen=True)
class Difference:
    """Patches of any kind: ComfyUI computes the patched weight from a dense copy, and the difference is used like it.

    ``function`` is that of the layer, ``linear`` or ``embedding``.
    """

    patches: tuple[Patch, ...]
    key: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        dense = weight.to(dtype=torch.float32).dequantize() if is_packed(weight) else weight.float()
        originals = {self.key: [(dense, None)]}
        patched = comfy.lora.calculate_weight(list(self.patches), dense.clone(), self.key, torch.float32, originals)
        if patched.shape != dense.shape:
            raise ValueError(f"A LoRA changes the shape of {self.key} from {tuple(dense.shape)} to "
                             f"{tuple(patched.shape)}, which this model cannot follow; remove that LoRA.")
        y.add_(self.function(x, patched.sub_(dense).to(y.dtype)))


def side_paths(patches: Sequence[Patch], key: str, shape: tuple[int, ...], device: torch.device,
               lookup: bool = False) -> tuple[SidePath, ...]:
    """The side paths, in order, that add the effect of ``patches`` on the weight ``key`` of ``shape``.

    ``lookup``: the weight is an Embedding's. Factors are copied to ``device`` here; whole matrices (plain differences
    and merges) stay where they are until they are used.
    """
    loras, lokrs, others = [], [], []
    for patch in patches:
        if _is_plain_lora(patch, shape) and not (lookup and patch[3]):
            loras.append(patch)
        elif _is_plain_lokr(patch, shape) and not lookup:
            lokrs.append(patch)
        else:
            others.append(patch)
    if others:  # They may scale or replace what the ones before have made, so all of them count, in order.
        moved = tuple((patch[0], _moved(patch[1], device), *patch[2:]) for patch in patches)
        return (Difference(moved, key, embedding if lookup else linear),)
    paths: list[SidePath] = [Kronecker(_moved(adapter, device), strength) for strength, adapter, *_ in lokrs]
    if loras:
        paths.insert(0, (_low_rank_rows if lookup else _low_rank)(loras, shape[0], device))
    return tuple(paths)


def factors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of the value of a patch that :func:`side_paths` copies to the device."""
    if isinstance(value, WeightAdapterBase):
        yield from (part for part in value.weights if isinstance(part, torch.Tensor))


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, WeightAdapterBase):
        return value
    # Copied, not made anew: newer ComfyUIs give their adapters more fields.
    moved = copy.copy(value)
    moved.weights = tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in value.weights)
    return moved


def _is_plain_lora(patch: Patch, shape: tuple[int, ...]) -> bool:
    _, value, strength_model, offset, function = patch
    if (strength_model != 1.0 or function is not None or not isinstance(value, LoRAAdapter)
            or len(value.weights) != 6):
        return False
    up, down, _, mid, dora, reshape = value.weights
    rows = shape[0] if offset is None else offset[2]
    return (mid is None and dora is None and reshape is None and (offset is None or offset[0] == 0)
            and up.flatten(1).shape == (rows, down.shape[0]) and down.flatten(1).shape[1] == shape[1])


def _is_plain_lokr(patch: Patch, shape: tuple[int, ...]) -> bool:
    _, value, strength_model, offset, function = patch
    if (strength_model != 1.0 or offset is not None or function is not None or not isinstance(value, LoKrAdapter)
            or len(value.weights) != 9):
        return False
    w1, w2, _, w1_a, w1_b, w2_a, w2_b, tucker, dora = value.weights
    if tucker is not None or dora is not None or any(
            part is not None and part.ndim != 2 for part in (w1, w2, w1_a, w1_b, w2_a, w2_b)):
        return False
    one = w1.shape if w1 is not None else (len(w1_a), w1_b.shape[1])
    other = w2.shape if w2 is not None else (len(w2_a), w2_b.shape[1])
    # With both factors decomposed, ComfyUI divides alpha by different ranks in its two ways to apply a LoKr.
    same_rank = w1 is not None or w2 is not None or len(w1_b) == len(w2_b)
    return same_rank and (one[0] * other[0], one[1] * other[1]) == tuple(shape)


def _stacked(patches: Sequence[Patch], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """``down`` and ``scale`` as in :class:`LowRank`, and ``up`` (rows, ranks) of each of ``patches``."""
    downs, scales, ups = [], [], []
    for strength, adapter, *_ in patches:
        up, down, alpha = adapter.weights[:3]
        downs.append(down.flatten(1).to(device))
        ups.append(up.flatten(1).to(device))
        scales.append(torch.full((len(down),), strength * (1.0 if alpha is None else alpha / len(down))))
    return _cat(downs, 0), torch.cat(scales).to(device), ups


def _cat(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
    return torch.cat([part.to(dtype) for part in parts], dim)


def _low_rank(patches: Sequence[Patch], rows: int, device: torch.device) -> LowRank:
    down, scale, ups = _stacked(patches, device)
    placed, rank = [], 0
    for (*_, offset, _), up in zip(patches, ups, strict=True):
        row, count = (0, rows) if offset is None else offset[1:]
        placed.append((row, count, rank, up))
        rank += up.shape[1]
    return LowRank(down, scale, tuple(placed))


def _low_rank_rows(patches: Sequence[Patch], rows: int, device: torch.device) -> LowRankRows:
    down, scale, ups = _stacked(patches, device)
    return LowRankRows(down, scale, _cat(ups, 1))
