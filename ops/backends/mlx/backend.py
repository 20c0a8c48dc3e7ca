"""The MLX backend: ``mx.quantized_matmul`` on the packed words, for Apple silicon.

The canonical codes are MLX's words, so nothing is repacked. This file decides when MLX is used; importing it does not
import MLX. What runs in MLX is in ``ops/backends/mlx/arrays.py`` (one product) and ``networks/klein_mlx.py`` (the whole
transformer).

MLX computes ``scales * code + biases``. The symmetric and affine forms of ``ops/packed.py`` are exactly that; the
zeropoint form ``s * (c - z)`` would need the rounded product ``-s * z``, so MLX does not take such weights.
"""

import platform
import sys
from contextlib import suppress

import torch

from ...devices import DTYPES
from ...packed import Packed
from .. import libraries
from ..interface import Digits

NAME = "mlx"
DEVICES: tuple[str, ...] = ("mps", "cpu")
LIBRARY = libraries.MLX

#: Group sizes that ``mx.quantized_matmul`` takes.
GROUPS = (32, 64, 128)


def problem(device: torch.device | None, digits: Digits = 0) -> str | None:
    """Why MLX cannot be used on this machine, or None. Imports MLX and multiplies once.

    A metallib built for a newer macOS fails at import, an older MLX refuses 1 bit, and a kernel may be missing.
    """
    one_bit = Packed(torch.zeros(32, 16, dtype=torch.uint8), torch.zeros(32, 1), None, 1, "symmetric")
    return libraries.problem(LIBRARY, lambda: multiply(torch.zeros(1, 128), one_bit))


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits, named: bool) -> bool:
    """Weights whose form is exactly MLX's, on Apple silicon. By name also on a CPU, in float32 (there MLX accumulates
    half types in half precision)."""
    apple_silicon = device.type == "mps" and platform.machine() == "arm64"
    here = apple_silicon or (named and dtype == torch.float32)
    return here and not digits and dtype in DTYPES.values() and takes(packed)


def takes(packed: Packed) -> bool:
    """Whether MLX's product with such a weight is exact in form."""
    return packed.form != "zeropoint" and packed.group in GROUPS


def multiply(x: torch.Tensor, packed: Packed, digits: Digits = 0) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``."""
    from . import arrays

    return arrays.multiply(x, packed)


def clear_cache() -> None:
    """Give the memory that MLX keeps for reuse back to the system, if MLX runs. Call it when a model is dropped."""
    if core := sys.modules.get(LIBRARY.module):
        with suppress(*libraries.FAILURES):
            core.clear_cache()
