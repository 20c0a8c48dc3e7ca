"""Two ways to multiply a packed weight by way of a dense copy of one layer that lives only during the call.

``exact``
    The weight is expanded to the activation dtype by one kernel and multiplied by the vendor's library (cuBLAS,
    rocBLAS, oneMKL). At the thousands of rows of an image this beats any kernel that unpacks inside the product: by
    bytes and operations the expansion costs 1.5 to 4 % of it (not measured).
``fast``
    The activations are rounded to int8 with one scale a row, and multiplied by the exact int8 levels. Every product
    and every sum inside a group is exact; the rounding of the activations is the whole error.

The dense copy is at most :data:`WORKSPACE_BYTES` and comes from torch's allocator at every call. In steady state that
is the same block each time without asking the driver; nothing is held between calls, two streams never share it, and
a CUDA graph records it. No function here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .triton_kernels import expand, int8_matmul, quantise_rows

#: The largest layer of FLUX.2 Klein 4B (27648 x 3072) is 170 MB in BF16.
WORKSPACE_BYTES = 200_000_000

#: Row blocks of a larger layer are a multiple of this, so that the library's tiles stay whole.
_ROW_MULTIPLE = 128


def row_blocks(n: int, k: int, itemsize: int) -> Iterator[slice]:
    """Cut the rows of an ``(n, k)`` weight so that a block of ``itemsize`` bytes an element fits the workspace."""
    step = max(_ROW_MULTIPLE, WORKSPACE_BYTES // (k * itemsize) // _ROW_MULTIPLE * _ROW_MULTIPLE)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, bits: int, form: str,
               dtype: torch.dtype) -> torch.Tensor:
    """``torch_backend.dequantize`` in one kernel, for BF16, FP16 and FP32. All inputs are contiguous."""
    out = torch.empty(codes.shape[0], codes.shape[1] * 8 // bits, dtype=dtype, device=codes.device)
    return expand(codes, scale, shift, bits, form, out)


def exact(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, bits: int, form: str,
          out: torch.Tensor) -> None:
    """``out`` ``(M, N)`` = ``x @ W.T`` for ``x`` ``(M, K)`` of the same dtype. Codes, scale, shift are contiguous."""
    workspace = None
    for part in row_blocks(codes.shape[0], x.shape[1], x.itemsize):
        count = part.stop - part.start
        if workspace is None:
            workspace = x.new_empty(count, x.shape[1])
        weight = expand(codes[part], scale[part], None if shift is None else shift[part], bits, form,
                        workspace[:count])
        torch.mm(x, weight.t(), out=out[:, part])


def fast(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """``out`` ``(M, N)`` ~ ``x @ W.T`` with int8 activations, for a symmetric weight in groups of a power of 2."""
    q, row = quantise_rows(x.contiguous())
    for part in row_blocks(codes.shape[0], x.shape[1], 1):
        levels = torch.empty(part.stop - part.start, x.shape[1], dtype=torch.int8, device=x.device)
        expand(codes[part], scale[part], None, bits, "levels", levels)
        int8_matmul(q, row, levels, scale[part].t().contiguous(), out[:, part])
