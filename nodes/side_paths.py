"""Side paths: the effect of patches on a weight, added to the result of its layer instead of merged into the weight.

Plain LoRAs (also a LoCon on a Linear) and, on a Linear, LoKrs stay in factored form. Every other kind (DoRA, LoHa,
GLoRA, OFT, BOFT, plain differences, merges) becomes the difference that it makes to this one weight: ComfyUI's own code
computes it in FP32 each time it is needed, and it is multiplied beside the weight.
"""

import copy
from collections.abc import Iterator, Sequence
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
        return self.device == device and [*map(id, self.patches)] == [*map(id, patches)]


@dataclass(frozen=True)
class LowRank:
    """LoRAs: ``y[..., columns] += (product(x, inner) * scale)[..., ranks] @ outer.T`` for each of ``outers``, whose
    ranks lie one after the other.

    On a Linear, ``inner`` ``(R, K)`` stacks ``down`` of all of them, and ``outers`` holds each ``up``. On an Embedding,
    ``inner`` ``(N, R)`` stacks every ``up``, and the only outer is every ``down``, transposed. ``scale`` ``(R,)``
    float32 is strength * alpha / rank. ``outers`` holds (first column, ``outer`` (columns, ranks)).
    """

    inner: torch.Tensor
    scale: torch.Tensor
    outers: tuple[tuple[int, torch.Tensor], ...]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        hidden = _product(x, self.inner, y.dtype) * self.scale.to(y.dtype)
        flat = y.view(-1, y.shape[-1])
        shares = hidden.view(-1, hidden.shape[-1]).split([outer.shape[1] for _, outer in self.outers], dim=1)
        for (column, outer), share in zip(self.outers, shares, strict=True):
            flat[:, column : column + len(outer)].addmm_(share, outer.to(y.dtype).t())


@dataclass(frozen=True)
class Kronecker:
    """One LoKr over all of a Linear's weight, applied by ComfyUI's own ``h``."""

    adapter: LoKrAdapter
    strength: float

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        y.add_(self.adapter.h(x, y), alpha=self.strength)


@dataclass(frozen=True)
class Difference:
    """Patches of any kind: ComfyUI computes the patched weight from a dense copy; the difference is used like it."""

    patches: tuple[Patch, ...]
    key: str

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        dense = weight.to(dtype=torch.float32).dequantize() if is_packed(weight) else weight.float()
        originals = {self.key: [(dense, None)]}
        patched = comfy.lora.calculate_weight(list(self.patches), dense.clone(), self.key, torch.float32, originals)
        if patched.shape != dense.shape:
            raise ValueError(f"A LoRA changes the shape of {self.key} from {tuple(dense.shape)} to "
                             f"{tuple(patched.shape)}, which this model cannot follow; remove that LoRA.")
        y.add_(_product(x, patched.sub_(dense), y.dtype))


def side_paths(patches: Sequence[Patch], key: str, shape: tuple[int, ...], device: torch.device,
               lookup: bool = False) -> tuple[SidePath, ...]:
    """The side paths, in order, that add the effect of ``patches`` on the weight ``key`` of ``shape``.

    ``lookup``: the weight is an Embedding's. Factors are copied to ``device`` here; whole matrices (plain differences
    and merges) stay where they are until they are used.
    """
    loras = [patch for patch in patches if _is_plain_lora(patch, shape, lookup)]
    lokrs = [patch for patch in patches if _is_plain_lokr(patch, shape) and not lookup]
    if len(loras) + len(lokrs) < len(patches):
        # The others may scale or replace what the ones before have made, so all of them count, in order.
        moved = tuple((patch[0], _moved(patch[1], device), *patch[2:]) for patch in patches)
        return (Difference(moved, key),)
    kroneckers = [Kronecker(_moved(adapter, device), strength) for strength, adapter, *_ in lokrs]
    return (_low_rank(loras, device, lookup), *kroneckers) if loras else tuple(kroneckers)


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


def _is_plain_lora(patch: Patch, shape: tuple[int, ...], lookup: bool) -> bool:
    match patch:
        case (_, LoRAAdapter(weights=(up, down, _, None, None, None)), 1.0, None | (0, _, _) as offset, None):
            rows = shape[0] if offset is None else offset[2]
            return (up.flatten(1).shape == (rows, len(down)) and down.flatten(1).shape[1] == shape[1]
                    and not (lookup and offset))
    return False


def _is_plain_lokr(patch: Patch, shape: tuple[int, ...]) -> bool:
    match patch:
        case (_, LoKrAdapter(weights=(w1, w2, _, w1_a, w1_b, w2_a, w2_b, None, None)), 1.0, None, None):
            if any(part is not None and part.ndim != 2 for part in (w1, w2, w1_a, w1_b, w2_a, w2_b)):
                return False
            one = w1.shape if w1 is not None else (len(w1_a), w1_b.shape[1])
            other = w2.shape if w2 is not None else (len(w2_a), w2_b.shape[1])
            # With both factors decomposed, ComfyUI divides alpha by different ranks in its two ways to apply a LoKr.
            same_rank = w1 is not None or w2 is not None or len(w1_b) == len(w2_b)
            return same_rank and (one[0] * other[0], one[1] * other[1]) == tuple(shape)
    return False


def _low_rank(loras: Sequence[Patch], device: torch.device, lookup: bool) -> LowRank:
    downs, scales, ups, columns = [], [], [], []
    for strength, adapter, _, offset, _ in loras:
        up, down, alpha = _moved(adapter, device).weights[:3]
        downs.append(down.flatten(1))
        ups.append(up.flatten(1))
        scale = strength * (1.0 if alpha is None else alpha / len(down))
        scales.append(torch.full((len(down),), scale, device=device))
        columns.append(offset[1] if offset else 0)
    if lookup:
        return LowRank(_cat(ups, 1), torch.cat(scales), ((0, _cat(downs, 0).t()),))
    return LowRank(_cat(downs, 0), torch.cat(scales), tuple(zip(columns, ups, strict=True)))


def _cat(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
    return torch.cat([part.to(dtype) for part in parts], dim)


def _product(x: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x @ matrix.T`` for activations, the rows of ``matrix`` for indices; in ``dtype``, that of the activations."""
    if x.is_floating_point():
        return linear(x, matrix.to(dtype))
    return embedding(x, matrix).to(dtype)
