"""The torch backend: dequantise in row blocks that stay in cache, multiply each in the activation dtype.

It runs on every device that torch has. On a CPU, a weight that is expanded whole travels to main memory and back; a
block of :data:`CPU_BLOCK_ELEMENTS` elements stays in the cache between the two steps (``benchmarks/linear.py``).
"""

import torch

from ..packed import Packed, dequantize
from .interface import Digits
from .libraries import TORCH

NAME = "torch"
DEVICES: tuple[str, ...] = ()
LIBRARY = TORCH

#: Elements of one dequantised block on a CPU: 9 MB in BF16. Measured best of 1.5 M to 9 M over the model's shapes.
CPU_BLOCK_ELEMENTS = 1536 * 3072

#: Elements of one block elsewhere: the largest layer of FLUX.2 Klein 4B (27648 x 3072) in one piece.
DEVICE_BLOCK_ELEMENTS = 27648 * 3072


def problem(device: torch.device | None, digits: Digits = 0) -> str | None:
    """None: torch is always there."""
    return None


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits, named: bool) -> bool:
    """Every product but those with int8 activations."""
    return not digits


def multiply(x: torch.Tensor, packed: Packed, digits: Digits = 0) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)`` of any floating dtype; ``(M, N)`` in that dtype."""
    out = x.new_empty(x.shape[0], packed.n)
    elements = CPU_BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    step = max(1, elements // packed.k)
    for start in range(0, packed.n, step):
        part = slice(start, start + step)
        torch.mm(x, dequantize(packed.rows(part), x.dtype).t(), out=out[:, part])
    return out
