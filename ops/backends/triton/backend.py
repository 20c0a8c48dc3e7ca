"""Our Triton kernels on GPUs: multiply by way of a dense copy of one layer that lives only during the call.

0 digits
    The weight is expanded to the activation dtype by one kernel and multiplied by the vendor's library (cuBLAS,
    rocBLAS, oneMKL). By bytes and operations the expansion costs 1.5 to 4 % of a product of thousands of rows (not
    measured).
1, 2 or adaptive digits
    The activations are rounded to int8 digits with a step for each row and group, and multiplied by the exact int8
    levels. Every product and every sum inside a group is exact; the rounding of the activations is the whole error
    (``ops/backends/interface.py``).

The dense copy comes from torch's allocator at every call. In steady state that is the same block each time without
asking the driver; nothing is held between calls, two streams never share it, and a CUDA graph records it. No function
here waits for the device.
"""

import importlib

import torch

from ...devices import AMPERE, DTYPES, current, gpu
from ...packed import Packed
from .. import libraries
from ..interface import Digits

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda", "xpu")
LIBRARY = libraries.TRITON

#: Groups whose products one int8 matrix instruction or several fill exactly. Bonsai Image has 128.
INT8_GROUPS = (32, 64, 128)

#: Up to so many rows a product is bound by reading the weight, and int8 activations save nothing.
INT8_MIN_ROWS = 65

#: The largest layer of FLUX.2 Klein 4B (27648 x 3072) is 170 MB in BF16: this holds each in one piece, and its product
#: fills the GPU. A copy of a quarter of that would stay in a large L2 cache (RTX 4090: 72 MB), but each of the smaller
#: products has a tail of idle multiprocessors.
WORKSPACE = 200_000_000

#: Row blocks of a larger layer are a multiple of this, so that the library's tiles stay whole.
_ROW_MULTIPLE = 128


def problem(device: torch.device | None, digits: Digits = 0) -> str | None:
    """Why Triton's kernels cannot be used on ``device`` (None: on any) with ``digits``, or None."""
    found = libraries.problem(LIBRARY, lambda: importlib.import_module(".kernels", __package__))
    if found is not None or device is None or not digits:
        return found
    vendor, name, capability = here = gpu(device)
    if vendor != "nvidia":
        return f"int8 activations are untested on {name}"
    if capability < AMPERE:  # Triton has no int8 matrix instructions there
        return f"int8 activations need an Ampere GPU or newer, {name} is {here.architecture}"
    return None


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits, named: bool) -> bool:
    """Groups of whole words of 8 elements; with ``digits``, many rows of a symmetric weight of 1 or 2 bits, and
    :data:`INT8_GROUPS`."""
    int8 = packed.form == "symmetric" and packed.bits <= 2 and packed.group in INT8_GROUPS and rows >= INT8_MIN_ROWS
    return dtype in DTYPES.values() and packed.group % 8 == 0 and (int8 or not digits)


def multiply(x: torch.Tensor, packed: Packed, digits: Digits = 0, workspace: int = WORKSPACE) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``. See the module docstring for ``digits``.

    ``workspace``: bytes of the dense copy at most.
    """
    from . import kernels

    packed = packed.contiguous()
    out = x.new_empty(x.shape[0], packed.n)
    blocks = row_blocks(packed, 1 if digits else x.itemsize, workspace)
    dense = x.new_empty(blocks[0].stop, packed.k, dtype=torch.int8 if digits else x.dtype)
    with current(x.device):
        rounded = kernels.quantize(x.contiguous(), packed.group, digits) if digits else None
        for part in blocks:
            weight = kernels.expand(packed.rows(part), dense[: part.stop - part.start])
            if rounded:
                scale = packed.scale[part].t().contiguous()
                kernels.int8_matmul(*rounded, weight, scale, out[:, part], digits)
            else:
                torch.mm(x, weight.t(), out=out[:, part])
    return out


def row_blocks(packed: Packed, itemsize: int, workspace: int) -> list[slice]:
    """Cut the rows of a weight so that a block of ``itemsize`` bytes an element fits ``workspace`` bytes."""
    step = max(_ROW_MULTIPLE, workspace // (packed.k * itemsize) // _ROW_MULTIPLE * _ROW_MULTIPLE)
    return [slice(start, min(start + step, packed.n)) for start in range(0, packed.n, step)]
