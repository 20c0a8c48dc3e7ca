"""The cpu backend: exact products at the speed of dense ones and int8 products well below, compiled on this machine.

exact
    A block of rows is expanded at memory speed, then multiplied by torch.
fast
    Activations are rounded to int8 with one scale a row and multiplied by the exact codes
    (``ops/backends/interface.py``), by the best instruction of this CPU.

Products use ``torch.get_num_threads()`` threads and hold nothing between calls. They can be interrupted between blocks,
which take some milliseconds.
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

NAME = "cpu"
DEVICES: tuple[str, ...] = ("cpu",)
LIBRARY = libraries.LLVMLITE

DTYPES = (torch.bfloat16, torch.float32)

#: Elements of one expanded block, 19 MB in BF16. Measured best of 2.4 M to 14 M over the model's shapes.
BLOCK_ELEMENTS = 3072 * 3072

#: Int8 activations multiplied at a time. Every panel of columns reads them all, from the shared cache: at 19 MB (1536
#: rows of 12288) the product took 1.75 times as long.
ACTIVATION_BYTES = 6 << 20

#: Fewer rows or columns do not fill a block of int8 sums.
MIN_ROWS, MIN_COLUMNS = 8, 64

_LOG = logging.getLogger(__name__)
_PROCESS = os.getpid()
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def problem(device: torch.device | None, fast: bool = False) -> str | None:
    """Why the kernels cannot be compiled here, or why int8 products gain nothing if ``fast``, or None."""
    if (found := libraries.problem(LIBRARY, instruction)) is None and fast and instruction() == "portable":
        return "int8 activations are not measured on this kind of CPU"
    return found


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, fast: bool, named: bool) -> bool:
    """BF16 and FP32 products; with ``fast``, symmetric 1- and 2-bit weights with a scale per 128."""
    if dtype not in DTYPES or packed.group % 32:
        return False
    return not fast or (packed.form == "symmetric" and packed.bits <= 2 and packed.group == 128
                        and rows >= MIN_ROWS and packed.n >= MIN_COLUMNS)


def multiply(x: torch.Tensor, packed: Packed, fast: bool = False) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``. See the module docstring for ``fast``."""
    return multiply_int8(x, packed, instruction()) if fast else multiply_exact(x, packed, instruction())


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
    groups, threads = scale.shape[1], torch.get_num_threads()
    step = -(-packed.n // threads)

    def rows(_worker: int, first: int) -> None:
        run(_address(codes, first), codes.stride(0), _address(scale, first), _address(shift, first),
            _address(out, first), min(step, packed.n - first), groups, packed.group // 32)

    spread(rows, range(0, packed.n, step), threads)
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


def multiply_int8(x: torch.Tensor, packed: Packed, kind: str) -> torch.Tensor:
    """:func:`multiply` with int8 activations by the instruction ``kind``.

    ``packed`` has at least :data:`MIN_COLUMNS` rows.
    """
    from . import kernels, products

    block, wide = kernels.KINDS[kind], x.dtype == torch.float32
    quantise = kernels.function(kernels.quantise, kind, bits=packed.bits, tile=block.tile, wide=wide)
    run = kernels.function(products.multiply, kind, name=kind, bits=packed.bits, wide=wide)
    x, codes = (t if t.stride(1) == 1 else t.contiguous() for t in (x, packed.codes))
    scale = packed.scale.t().to(torch.float32).contiguous()
    groups, threads = scale.shape[0], torch.get_num_threads()
    size = min(x.shape[0], max(block.rows, ACTIVATION_BYTES // packed.k))
    padded = -(-size // block.rows) * block.rows
    q, row = torch.empty(padded, packed.k, dtype=torch.int8), torch.empty(padded)
    start = torch.empty(padded, groups, dtype=torch.int32)
    # For each thread a panel, and behind it room for the sums of a block and for eight tiles.
    panel = block.columns * packed.k
    rooms = torch.empty(threads, panel + 4 * block.rows * block.columns + 8 * 1024, dtype=torch.uint8)
    out = x.new_empty(x.shape[0], packed.n)

    for part, result in zip(x.split(size), out.split(size), strict=True):
        rows = part.shape[0]
        step = -(-rows // threads)

        def round_rows(_worker: int, first: int, part=part, rows=rows, step=step) -> None:
            quantise(part.data_ptr(), part.stride(0), q.data_ptr(), row.data_ptr(), start.data_ptr(), first,
                     min(step, rows - first), groups)

        def columns(worker: int, first: int, result=result, rows=rows) -> None:
            # The last block overlaps the one before it, which computes the same values.
            first = min(first, packed.n - block.columns)
            room = _address(rooms, worker)
            run(q.data_ptr(), row.data_ptr(), start.data_ptr(), _address(codes, first), codes.stride(0),
                scale.data_ptr() + 4 * first, packed.n, room, room + panel,
                result.data_ptr() + result.element_size() * first, rows, groups)

        spread(round_rows, range(0, rows, step), threads)
        spread(columns, range(0, packed.n, block.columns), threads)
    return out


def _address(tensor: torch.Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def spread(task: Callable[[int, int], None], indices: range, threads: int) -> None:
    """Call ``task(worker, index)`` for all ``indices`` on ``threads`` threads, ``worker`` counting those.

    They are the threads of torch's own OpenMP pool where that is GNU's: after each operation of torch they go on
    spinning for some milliseconds, and others would have to share the cores with them. On an exception, Ctrl-C too, all
    stop after the index in hand, and it is raised here.
    """
    todo, workers, failures = iter(indices), iter(range(threads)), []

    def work(_data: Any = None) -> None:
        try:
            worker = next(workers)
            for index in todo:
                task(worker, index)
        except BaseException as failure:
            failures.append(failure)
            for _ in todo:
                pass

    if threads == 1 or len(indices) == 1:
        work()
    # OpenMP's threads do not exist in a forked child.
    elif (parallel := _gnu_openmp()) and os.getpid() == _PROCESS:
        parallel(_CALLBACK(work), None, threads, 0)
    else:
        # Ctrl-C comes to this thread, so it must be one that works: it ends the list for the others.
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(work)
            work()
    if failures:
        raise failures[0]


@functools.cache
def _gnu_openmp() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the libgomp that torch brings, or None (macOS, Windows)."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes, function.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function
