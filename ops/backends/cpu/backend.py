"""The cpu backend: products in the time of dense ones, and with int8 digits in less, compiled on this machine.

0 digits
    A block of rows is expanded at memory speed, then multiplied by torch.
1, 2 or adaptive digits
    Activations are rounded to int8 digits and multiplied by the exact codes (``ops/backends/interface.py``), by the
    best instruction of this CPU.

Products use ``torch.get_num_threads()`` threads and hold nothing between calls. They can be interrupted between blocks
of some hundred rows.
"""

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...packed import Packed
from .. import libraries
from ..interface import Digits

NAME = "cpu"
DEVICES: tuple[str, ...] = ("cpu",)
LIBRARY = libraries.LLVMLITE

DTYPES = (torch.bfloat16, torch.float32)

#: Elements of one expanded block, 19 MB in BF16. Measured best of 2.4 M to 14 M over the model's shapes.
BLOCK_ELEMENTS = 3072 * 3072

#: Int8 activations multiplied at a time. Every panel of columns reads them all, from the shared cache: at 19 MB (1536
#: rows of 12288) the product took 1.75 times as long.
ACTIVATION_BYTES = 6 << 20

#: Fewer columns do not fill a block of int8 sums.
MIN_COLUMNS = 64

#: Elements of a weight or of activations that are expanded or rounded in one piece: a tenth of a millisecond.
PIECE_ELEMENTS = 1 << 17

#: Instructions of vectors for which another thread is worth waking: a tenth of a millisecond.
WORK = 1 << 18

_LOG = logging.getLogger(__name__)
_PROCESS = os.getpid()


def problem(device: torch.device | None, digits: Digits = 0) -> str | None:
    """Why the kernels cannot be compiled here, or why int8 products gain nothing with ``digits``, or None."""
    if (found := libraries.problem(LIBRARY, instruction)) is None and digits and instruction() == "portable":
        return "int8 activations are not measured on this kind of CPU"
    return found


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits, named: bool) -> bool:
    """BF16 and FP32 products; with ``digits``, groups of 64 or 128 and columns enough for a block."""
    if dtype not in DTYPES or packed.group % 32:
        return False
    return not digits or (packed.group in (64, 128) and packed.n >= MIN_COLUMNS)


def multiply(x: torch.Tensor, packed: Packed, digits: Digits = 0) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``. See the module docstring for ``digits``."""
    if digits:
        return multiply_digits(x, packed, instruction(), digits)
    return multiply_exact(x, packed, instruction())


@functools.cache
def instruction() -> str:
    """The name of the best of ``kernels.KINDS`` that this machine has, logged once."""
    from . import kernels

    names = kernels.kinds()
    if names[0] == "amx" and not _amx_permitted():
        names = names[1:]
    _LOG.info("Bonsai Image: kernels for packed weights on the CPU are compiled for %s, the best it has.", names[0])
    return names[0]


def _amx_permitted() -> bool:
    """Ask Linux for the state of AMX tiles, which a process must before it uses them (arch_prctl(2))."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def expand(packed: Packed, dtype: torch.dtype, kind: str, out: torch.Tensor) -> torch.Tensor:
    """``packed.dequantize``, bit for bit, into ``out``: contiguous, of ``dtype`` BF16 or FP32."""
    from . import kernels

    run = kernels.function(kernels.expand, kind, bits=packed.bits, form=packed.form, wide=dtype == torch.float32)
    # Levels of at most 2 bits times a scale of the dtype: exact.
    scale = packed.scale.to(dtype) if packed.form == "symmetric" and packed.bits <= 2 else packed.scale
    scale = scale.to(torch.float32).contiguous()
    shift = scale if packed.shift is None else packed.shift.to(torch.float32).contiguous()
    codes = packed.codes if packed.codes.stride(1) == 1 else packed.codes.contiguous()
    step = max(1, PIECE_ELEMENTS // packed.k)
    spread(run, -(-packed.n // step), packed.n * packed.k // 32, codes, codes.stride(0), scale, shift, out, packed.n,
           step, scale.shape[1], packed.group // 32)
    return out


def multiply_exact(x: torch.Tensor, packed: Packed, kind: str) -> torch.Tensor:
    """:func:`multiply` by expanded blocks, compiled for ``kind``."""
    out = x.new_empty(x.shape[0], packed.n)
    step = max(1, BLOCK_ELEMENTS // packed.k)
    block = x.new_empty(min(step, packed.n), packed.k)
    for first in range(0, packed.n, step):
        part = packed.rows(slice(first, first + step))
        torch.mm(x, expand(part, x.dtype, kind, block[: part.n]).t(), out=out[:, first : first + step])
    return out


def multiply_digits(x: torch.Tensor, packed: Packed, kind: str, digits: Digits) -> torch.Tensor:
    """:func:`multiply` with int8 ``digits`` by the instruction ``kind``.

    ``packed`` has at least :data:`MIN_COLUMNS` rows.
    """
    from . import kernels, products

    block, planes = kernels.KINDS[kind], 1 if digits == 1 else 2
    constants: dict[str, Any] = {"bits": packed.bits, "form": packed.form, "group": packed.group,
                                 "wide": x.dtype == torch.float32, "digits": digits}
    quantize = kernels.function(kernels.quantize, kind, block=block.rows, tile=block.tile, **constants)
    run = kernels.function(products.multiply, kind, name=kind, **constants)
    x, codes = (t if t.stride(1) == 1 else t.contiguous() for t in (x, packed.codes))
    scale = packed.scale.t().to(torch.float32).contiguous()
    shift = scale if packed.shift is None else packed.shift.t().to(torch.float32).contiguous()
    if packed.form == "zeropoint":
        shift = shift.mul_(scale).neg_()
    groups, k = scale.shape[0], packed.k
    size = min(x.shape[0], max(block.rows, ACTIVATION_BYTES // k // planes // block.rows * block.rows))
    padded = -(-size // block.rows) * block.rows
    q = torch.empty(planes, padded, k, dtype=torch.int8)
    # The rows that fill a block are computed and not stored: zeros are no subnormal numbers.
    step, total = torch.zeros(2, padded, groups)
    second = torch.zeros(-(-size // block.rows), groups, dtype=torch.int32)
    room = block.sums + block.columns * k
    rooms = torch.empty(torch.get_num_threads() * room, dtype=torch.uint8)
    out = x.new_empty(x.shape[0], packed.n)
    piece = max(1, PIECE_ELEMENTS // k // block.rows) * block.rows
    for part, result in zip(x.split(size), out.split(size), strict=True):
        rows = part.shape[0]
        second.zero_()
        rounded = q, padded * k, step, total, second
        spread(quantize, -(-rows // piece), rows * k // 8, part, part.stride(0), *rounded, rows, piece, groups)
        spread(run, -(-packed.n // block.columns), rows * k * packed.n // 64 * planes, *rounded, codes,
               codes.stride(0), scale, shift, packed.n, rooms, room, result, rows, groups)
    return out


def spread(function: Callable[[Any], None], pieces: int, work: int, *arguments: torch.Tensor | int) -> None:
    """Compute the ``pieces`` of a kernel with ``arguments`` on as many threads as torch has, on one if there is little
    ``work``, counted in instructions.

    The threads take one piece after the other, so one that the system puts aside holds up no more than a piece. They
    are those of torch's own OpenMP pool where that is GNU's: after each operation of torch they go on spinning for some
    milliseconds, and others would have to share the cores with them.
    """
    job = (ctypes.c_int64 * (3 + len(arguments)))(
        0, pieces, 0, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))
    threads = min(torch.get_num_threads(), pieces, -(-work // WORK))
    if threads == 1:
        function(job)
    # OpenMP's threads do not exist in a forked child.
    elif (parallel := _gnu_openmp()) and os.getpid() == _PROCESS:
        parallel(function, job, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(function, job)
            function(job)


@functools.cache
def _gnu_openmp() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the libgomp that torch brings, or None (macOS, Windows)."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function
