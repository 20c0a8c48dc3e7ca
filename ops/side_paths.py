"""Side paths: the effect of adapters on a weight, added to the result of its layer instead of merged into the weight.

A LoRA and a LoKr stay in factors, in the dtype of the activations; a LoHa and a whole difference are multiplied as a
matrix; a DoRA depends on the weight, which is expanded to FP32 each time. Nothing is kept between calls, and factors
may need a gradient.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch.nn.functional import embedding, linear

from .packed import is_packed

#: One matrix, or two that are multiplied with each other.
Chain = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Adapter:
    """A change of a weight ``(N, K)``: ``scale`` times

    - ``product``: ``one``; a LoRA is its ``up`` (N, rank) and ``down`` (rank, K), a whole difference one matrix;
    - ``hadamard`` (LoHa): ``one * other``, elementwise;
    - ``kronecker`` (LoKr): ``kron(one, other)``.

    ``cut``: which rows of a LoKr count, (first, end); None for all.
    """

    kind: Literal["product", "hadamard", "kronecker"]
    one: Chain
    other: Chain = ()
    scale: float = 1.0
    cut: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``; empty where the factors do not fit each other."""
        one, other = _shape(self.one), _shape(self.other) if self.other else ()
        if self.kind != "kronecker":
            return one if self.kind == "product" or one == other else ()
        if not len(one) == len(other) == 2:
            return ()
        return self.cut[1] - self.cut[0] if self.cut else one[0] * other[0], one[1] * other[1]

    def matrix(self) -> torch.Tensor:
        """The change, float32."""
        matrix = self.scale * _multiplied(self.one)
        if self.kind == "hadamard":
            return matrix * _multiplied(self.other)
        if self.kind == "kronecker":
            matrix = torch.kron(matrix, _multiplied(self.other))
        return matrix[slice(*self.cut)] if self.cut else matrix

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Activations ``(..., K)`` times the transposed change ``(..., N)``, a LoKr without making it."""
        if self.kind != "kronecker":
            return _product(x, self.matrix(), x.dtype)
        hidden = x.unflatten(-1, (_shape(self.one)[1], -1))
        for factor in reversed(self.other):
            hidden = linear(hidden, factor.to(x.dtype))
        for factor in reversed(self.one):
            hidden = factor.to(x.dtype) @ hidden
        hidden = self.scale * hidden.flatten(-2)
        return hidden[..., slice(*self.cut)] if self.cut else hidden

    def rows(self, first: int, end: int) -> "Adapter":
        """The change of some rows."""
        if self.kind == "kronecker":
            start = self.cut[0] if self.cut else 0
            return replace(self, cut=(start + first, start + end))
        one, other = ((chain[0][first:end], *chain[1:]) if chain else () for chain in (self.one, self.other))
        return replace(self, one=one, other=other)


def lora(up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> Adapter:
    """``scale * up @ down`` of ``up`` (N, rank) and ``down`` (rank, K); ``scale`` is alpha / rank."""
    return Adapter("product", (up, down), scale=scale)


@dataclass(frozen=True)
class Patch:
    """An adapter at a strength. ``place``: the first row and the number of rows that it changes; None for all.

    ``magnitude``, of a DoRA, is the norm of every row ``(N, 1)`` or every column ``(1, K)`` of the changed weight.
    """

    adapter: Adapter
    strength: float = 1.0
    place: tuple[int, int] | None = None
    magnitude: torch.Tensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a change of a weight of ``shape``."""
        first, n = self.place or (0, shape[0])
        return (self.adapter.shape == (n, *shape[1:]) and first + n <= shape[0]
                and (self.magnitude is None or tuple(self.magnitude.shape) in ((n, 1), (1, *shape[1:]))))

    def within(self, first: int, n: int) -> "Patch | None":
        """The part of it on ``n`` rows from ``first``, which then count from 0. Not for a DoRA."""
        start, size = self.place or (0, self.adapter.shape[0])
        low, high = max(start, first), min(start + size, first + n)
        return replace(self, adapter=self.adapter.rows(low - start, high - start),
                       place=(low - first, high - low)) if low < high else None


class SidePath(Protocol):
    """Adds the effect of patches on one weight ``(N, K)``."""

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add it, in place, to ``y``, the contiguous result of the layer.

        Linear: ``x`` is the activations ``(..., K)`` in the dtype of ``y`` ``(..., N)``. Embedding: ``x`` is the
        indices ``(...)``, and ``y`` the rows ``(..., K)``. ``weight`` is packed or dense, on the device of ``y``, and
        is only read.
        """


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
class Product:
    """One patch of another kind than LoRA, or any on an Embedding, which is on all rows there."""

    patch: Patch

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        adapter, place = self.patch.adapter, self.patch.place or (0, y.shape[-1])
        part = adapter.product(x) if x.is_floating_point() else _product(x, adapter.matrix(), y.dtype)
        y.narrow(-1, *place).add_(part, alpha=self.patch.strength)


@dataclass(frozen=True)
class Difference:
    """Whatever ``change`` makes of a dense weight, float32, in memory of its own, less that weight."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        before = dense(weight)
        y.add_(_product(x, self.change(before).sub_(before), y.dtype))


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A packed or dense ``weight`` in float32."""
    return weight.to(dtype=torch.float32).dequantize() if is_packed(weight) else weight.float()


def changed(patches: Sequence[Patch], weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` ``(N, K)``, float32, changed by ``patches``, one after the other.

    Of a DoRA, the norms of the rows are those before its own change, the norms of columns those after: as in ComfyUI.
    """
    weight = weight.clone()
    for patch in patches:
        rows = weight.narrow(0, *(patch.place or (0, len(weight))))
        change = patch.adapter.matrix().to(rows.device)
        if (magnitude := patch.magnitude) is not None:
            sum_ = rows + change
            norm = rows.norm(dim=1, keepdim=True) if len(magnitude) == len(rows) else sum_.norm(dim=0, keepdim=True)
            change = sum_ * (magnitude.float() / (norm + torch.finfo(norm.dtype).eps)) - rows
        rows.add_(change, alpha=patch.strength)
    return weight


def side_paths(patches: Sequence[Patch], lookup: bool = False) -> tuple[SidePath, ...]:
    """The side paths that add the effect of ``patches``, all of which fit. ``lookup``: the weight is an Embedding's."""
    if any(patch.magnitude is not None for patch in patches):
        # A DoRA scales what those before it have made, so all of them count, in order.
        return (Difference(functools.partial(changed, tuple(patches))),)
    loras: list[Patch] = []
    others: list[Patch] = []
    for patch in patches:
        (loras if patch.adapter.kind == "product" and len(patch.adapter.one) == 2 else others).append(patch)
    return (*([_low_rank(loras, lookup)] if loras else ()), *map(Product, others))


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, at any depth, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def _low_rank(patches: Sequence[Patch], lookup: bool) -> LowRank:
    ups, downs = zip(*(patch.adapter.one for patch in patches), strict=True)
    scale = torch.cat([torch.full((len(down),), patch.strength * patch.adapter.scale, device=down.device)
                       for patch, down in zip(patches, downs, strict=True)])
    if lookup:
        return LowRank(_cat(ups, 1), scale, ((0, _cat(downs, 0).t()),))
    columns = [patch.place[0] if patch.place else 0 for patch in patches]
    return LowRank(_cat(downs, 0), scale, tuple(zip(columns, ups, strict=True)))


def _cat(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
    return torch.cat([part.to(dtype) for part in parts], dim) if len(parts) > 1 else parts[0]


def _product(x: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x @ matrix.T`` for activations, the rows of ``matrix`` for indices; in ``dtype``, that of the activations."""
    if x.is_floating_point():
        return linear(x, matrix.to(x.device, dtype))
    return embedding(x, matrix.to(x.device)).to(dtype)


def flat(factor: torch.Tensor) -> torch.Tensor:
    """A factor made for a convolution with a kernel of 1 x 1 as a matrix; any other as it is."""
    return factor.flatten(1) if factor.ndim > 2 else factor


def _shape(chain: Chain) -> tuple[int, ...]:
    """The shape of the product; empty where the factors do not fit each other."""
    if len(chain) == 1:
        return tuple(chain[0].shape)
    fit = all(factor.ndim == 2 for factor in chain) and all(a.shape[1] == b.shape[0] for a, b in pairwise(chain))
    return (chain[0].shape[0], chain[-1].shape[1]) if fit else ()


def _multiplied(chain: Chain) -> torch.Tensor:
    """The product in float32."""
    return functools.reduce(torch.matmul, (factor.float() for factor in chain))
