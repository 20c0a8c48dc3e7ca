"""Side paths: the effect of adapters on a weight, added to the result of its layer instead of merged into the weight.

A LoRA and a LoKr stay in factors, in the dtype of the activations; a LoHa and a whole difference are multiplied as a
matrix; a DoRA depends on the weight, which is expanded to FP32 each time. Nothing is kept between calls, and factors
may need a gradient.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch.nn.functional import embedding, linear

from .packed import is_packed

#: One matrix, or two that are multiplied with each other.
Chain = tuple[torch.Tensor, ...]


class Adapter(NamedTuple):
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

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Activations ``(..., K)`` times the transposed change ``(..., N)``, a LoKr without making it; or its rows at
        the indices ``x``. In ``dtype``, that of the activations."""
        if self.kind != "kronecker" or not x.is_floating_point():
            return _product(x, self.matrix(), dtype)
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
            return self._replace(cut=(start + first, start + end))
        one, other = ((chain[0][first:end], *chain[1:]) if chain else () for chain in (self.one, self.other))
        return self._replace(one=one, other=other)


class Patch(NamedTuple):
    """An adapter at a strength. ``place``: the first row and the number of rows that it changes; None for all, as on an
    Embedding.

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
        return self._replace(adapter=self.adapter.rows(low - start, high - start),
                       place=(low - first, high - low)) if low < high else None

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the effect on one weight ``(N, K)``, in place, to ``y``, the contiguous result of the layer. Not for a
        DoRA.

        Linear: ``x`` is the activations ``(..., K)`` in the dtype of ``y`` ``(..., N)``. Embedding: ``x`` is the
        indices ``(...)``, and ``y`` the rows ``(..., K)``. ``weight`` is packed or dense, on the device of ``y``, and
        is only read.
        """
        adapter, part = self.adapter, y.narrow(-1, *(self.place or (0, y.shape[-1])))
        if adapter.kind != "product" or len(adapter.one) == 1:
            part.add_(adapter.product(x, y.dtype), alpha=self.strength)
            return
        up, down = adapter.one
        inner, outer = (down, up.t()) if x.is_floating_point() else (up, down)
        hidden = _product(x, inner, y.dtype).view(-1, len(down))
        part.view(-1, part.shape[-1]).addmm_(hidden, outer.to(y.dtype), alpha=self.strength * adapter.scale)


class Difference(NamedTuple):
    """Whatever ``change`` makes of a dense weight, float32, in memory of its own, less that weight."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """As :meth:`Patch.add`."""
        before = dense(weight)
        y.add_(_product(x, self.change(before).sub_(before), y.dtype))


#: What adds the effect of patches to the result of a layer.
SidePath: TypeAlias = Patch | Difference


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


def side_paths(patches: Sequence[Patch]) -> tuple[SidePath, ...]:
    """The side paths that add the effect of ``patches``, all of which fit."""
    if any(patch.magnitude is not None for patch in patches):
        # A DoRA scales what those before it have made, so all of them count, in order.
        return (Difference(functools.partial(changed, tuple(patches))),)
    return tuple(patches)


def _product(x: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x @ matrix.T`` for activations, the rows of ``matrix`` for indices; in ``dtype``, that of the activations."""
    if x.is_floating_point():
        return linear(x, matrix.to(x.device, dtype))
    return embedding(x, matrix.to(x.device)).to(dtype)


def _shape(chain: Chain) -> tuple[int, ...]:
    """The shape of the product; empty where the factors do not fit each other."""
    if len(chain) == 1:
        return tuple(chain[0].shape)
    fit = all(factor.ndim == 2 for factor in chain) and all(a.shape[1] == b.shape[0] for a, b in pairwise(chain))
    return (chain[0].shape[0], chain[-1].shape[1]) if fit else ()


def _multiplied(chain: Chain) -> torch.Tensor:
    """The product in float32."""
    return functools.reduce(torch.matmul, (factor.float() for factor in chain))
