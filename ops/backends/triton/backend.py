"""Our Triton kernels on GPUs: multiply by way of a dense copy of one layer that lives only during the call.

exact
    The weight is expanded to the activation dtype by one kernel and multiplied by the vendor's library (cuBLAS,
    rocBLAS, oneMKL). At the thousands of rows of an image this beats any kernel that unpacks inside the product: by
    bytes and operations the expansion costs 1.5 to 4 % of it (not measured).
fast
    The activations are rounded to int8 with one scale a row, and multiplied by the exact int8 levels. Every product
    and every sum inside a group is exact; the rounding of the activations is the whole error
    (``ops/backends/interface.py``).

The dense copy (its size: ``ops/backends/tuning.py``) comes from torch's allocator at every call. In steady state that
is the same block each time without asking the driver; nothing is held between calls, two streams never share it, and
a CUDA graph records it. No function here waits for the device.
"""

import importlib

import torch

from ...devices import AMPERE, DTYPES, current, gpu
from ...packed import Packed
from .. import libraries
from ..tuning import Tuning, tuning

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda", "xpu")
LIBRARY = libraries.TRITON

#: Groups whose products one int8 matrix instruction or several fill exactly. Bonsai Image has 128.
INT8_GROUPS = (32, 64, 128)

#: Up to so many rows a product is bound by reading the weight, and int8 activations save nothing.
INT8_MIN_ROWS = 65

#: Row blocks of a larger layer are a multiple of this, so that the library's tiles stay whole.
_ROW_MULTIPLE = 128


def problem(device: torch.device | None, fast: bool = False) -> str | None:
    """Why Triton's kernels cannot be used on ``device`` (None: on any), with int8 activations if ``fast``, or None."""
    found = libraries.problem(LIBRARY, lambda: importlib.import_module(".kernels", __package__))
    if found is not None or device is None or not fast:
        return found
    vendor, name, capability = here = gpu(device)
    if vendor != "nvidia":
        return f"int8 activations are untested on {name}"
    if capability < AMPERE:
        return f"int8 activations need an Ampere GPU or newer, {name} is {here.architecture}"
    # Data-centre GPUs multiply int8 only twice as fast as BF16; converting the sum of every group eats that up.
    if capability in (AMPERE, (9, 0)) or capability[0] == 10:
        return f"int8 activations gain nothing on {name} ({here.architecture})"
    return None


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, fast: bool, named: bool) -> bool:
    """Groups of whole words of 8 elements; with ``fast``, many rows of a symmetric weight, and :data:`INT8_GROUPS`."""
    int8 = packed.form == "symmetric" and packed.group in INT8_GROUPS and rows >= INT8_MIN_ROWS
    return dtype in DTYPES.values() and packed.group % 8 == 0 and (int8 or not fast)


def multiply(x: torch.Tensor, packed: Packed, fast: bool = False, tuned: Tuning | None = None) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``. See the module docstring for ``fast``.

    ``tuned``: in place of what ``ops/backends/tuning.py`` has for the device.
    """
    from .kernels import expand, expand_levels, int8_matmul, quantise_rows

    packed, tuned = packed.contiguous(), tuned or tuning(x.device)
    out = x.new_empty(x.shape[0], packed.n)
    blocks = row_blocks(packed, 1 if fast else x.itemsize, tuned.workspace)
    with current(x.device):
        if fast:
            q, row = quantise_rows(x.contiguous())
            for part in blocks:
                int8_matmul(q, row, *expand_levels(packed.rows(part)), out[:, part], tuned.tile)
        else:
            workspace = x.new_empty(blocks[0].stop, packed.k)
            for part in blocks:
                weight = expand(packed.rows(part), workspace[: part.stop - part.start])
                torch.mm(x, weight.t(), out=out[:, part])
    return out


def row_blocks(packed: Packed, itemsize: int, workspace: int) -> list[slice]:
    """Cut the rows of a weight so that a block of ``itemsize`` bytes an element fits ``workspace`` bytes."""
    step = max(_ROW_MULTIPLE, workspace // (packed.k * itemsize) // _ROW_MULTIPLE * _ROW_MULTIPLE)
    return [slice(start, min(start + step, packed.n)) for start in range(0, packed.n, step)]
