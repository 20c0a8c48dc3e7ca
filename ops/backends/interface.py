"""What a backend is, and what it computes with int8 activations: the contract that every one of them keeps."""

from collections.abc import Hashable
from typing import Protocol

import torch

from ..packed import Packed, dequantize
from .libraries import Library


class Backend(Hashable, Protocol):
    """A module, or any object, that multiplies packed weights.

    To add one, write a module with these names, and add it to ``backends.BACKENDS``.
    """

    #: What users choose it by.
    NAME: str
    #: The torch device types that it runs on; empty: all.
    DEVICES: tuple[str, ...]
    #: What it is built on.
    LIBRARY: Library

    def problem(self, device: torch.device | None, fast: bool = False) -> str | None:
        """Why it cannot be used on ``device``, with int8 activations if ``fast``; None if it can.

        One sentence without its full stop. With no ``device``, only what is installed is judged.
        """

    def serves(self, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, fast: bool,
               named: bool) -> bool:
        """Whether it takes the product of ``rows`` activations of ``dtype`` with ``packed``. Waits for no device.

        With ``named``, the user chose this backend: it takes all that it can, otherwise what it is the fastest for.
        """

    def multiply(self, x: torch.Tensor, packed: Packed, fast: bool) -> torch.Tensor:
        """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1; ``(M, N)`` in the dtype of ``x``.

        With ``fast``, as :func:`int8_reference` defines it; else exact up to the rounding of the dtype.
        """


def int8_reference(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``x @ W.T`` with int8 activations for ``x`` ``(M, K)`` and a symmetric weight; float32 ``(M, N)``.

    The definition of what a backend computes with ``fast``, in plain torch, slow but on any device. For
    ``W[n, k] = scale[n, k // group] * level[n, k]``::

        q[m, k] = round(x[m, k] * (127 / amax[m]))                      int8, amax[m] = max over k of |x[m, k]|
        out[m, n] = amax[m] / 127 * sum_g scale[n, g] * sum_{k in g} q[m, k] * level[n, k]

    The inner sum is exact. The outer sum and the two scales are float32.
    """
    groups = packed.scale.shape[1]
    levels = dequantize(packed._replace(scale=torch.ones_like(packed.scale)), torch.float32)
    q, row = quantise_rows(x)
    total = torch.zeros(x.shape[0], packed.n, dtype=torch.float32, device=x.device)
    for g, (left, right) in enumerate(zip(q.float().chunk(groups, 1), levels.chunk(groups, 1), strict=True)):
        # Float32 holds the sums exactly: they are at most 127 * 8 * 128.
        total += (left @ right.t()) * packed.scale[:, g].float()
    return total * row[:, None]


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``(M, K)`` -> int8 ``(M, K)`` and float32 ``(M,)`` with ``x ~ q * row[:, None]``."""
    amax = x.float().abs().amax(1)
    # A number divided by a tensor would be computed as a reciprocal and a product, rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return torch.round(x.float() * inverse[:, None]).to(torch.int8), amax / 127.0
