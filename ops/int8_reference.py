"""Int8 activations in plain torch: the definition of what a backend computes with ``fast``, slow but on any device.

For a symmetric weight ``W[n, k] = scale[n, k // group] * level[n, k]`` and activations ``x``::

    q[m, k] = round(x[m, k] * (127 / amax[m]))                          int8, amax[m] = max over k of |x[m, k]|
    out[m, n] = amax[m] / 127 * sum_g scale[n, g] * sum_{k in g} q[m, k] * level[n, k]

The inner sum is exact. The outer sum and the two scales are float32.
"""

from __future__ import annotations

import torch

from .packed import Packed, dequantize


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``(M, K)`` -> int8 ``(M, K)`` and float32 ``(M,)`` with ``x ~ q * row[:, None]``."""
    amax = x.float().abs().amax(1)
    # A number divided by a tensor would be computed as a reciprocal and a product, rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return torch.round(x.float() * inverse[:, None]).to(torch.int8), amax / 127.0


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``x @ W.T`` with int8 activations for ``x`` ``(M, K)`` and a symmetric weight; float32 ``(M, N)``."""
    groups = packed.scale.shape[1]
    levels = dequantize(packed._replace(scale=torch.ones_like(packed.scale)), torch.float32)
    q, row = quantise_rows(x)
    total = torch.zeros(x.shape[0], packed.n, dtype=torch.float32, device=x.device)
    for g, (left, right) in enumerate(zip(q.float().chunk(groups, 1), levels.chunk(groups, 1), strict=True)):
        # Float32 holds the sums exactly: they are at most 127 * 8 * 128.
        total += (left @ right.t()) * packed.scale[:, g].float()
    return total * row[:, None]
