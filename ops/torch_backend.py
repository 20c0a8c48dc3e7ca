"""The torch backend: dequantise in row blocks that stay in cache, multiply each in the activation dtype.

It serves every device torch has. On a CPU, expanding a whole weight first writes and reads it through main memory;
a block of :data:`CPU_BLOCK_ELEMENTS` elements stays in the cache between the two steps (``benchmarks/linear.py``).

A symmetric weight of at most 2 bits is a level in {-1, 0, 1, 2} times its scale: one rounding, that of the scale to
the compute dtype (none where the scale is representable there). The other forms are computed in float32 and rounded
once at the end.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

#: bits -> (step, origin): a symmetric level is ``step * code - origin``. 1 bit: -1, 1. 2 bits: -1, 0, 1 (code 3 is
#: unused by ternary weights and decodes to 2, as it does in MLX and GemLite). 4 bits: -8 .. 7.
LEVELS = {1: (2, 1), 2: (1, 1), 4: (1, 8)}

#: Elements of one dequantised block on a CPU: 9 MB in BF16. Measured best of 1.5 M to 9 M over the model's shapes.
CPU_BLOCK_ELEMENTS = 1536 * 3072

#: Elements of one block elsewhere: the largest layer of FLUX.2 Klein 4B (27648 x 3072) in one piece.
DEVICE_BLOCK_ELEMENTS = 27648 * 3072


def _byte_table(bits: int, symmetric: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``(256, 8 / bits)``: the levels (or, if not symmetric, the codes) that one byte holds."""
    shifts = torch.arange(0, 8, bits, device=device)
    codes = (torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)
    if symmetric:
        step, origin = LEVELS[bits]
        codes = step * codes - origin
    return codes.to(dtype)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bits: int,
    form: str,
    dtype: torch.dtype,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight ``(N, K)`` in ``dtype`` of a canonical packed one (see ``ops/packed.py``).

    ``table`` is the result of :func:`lookup_table` for the same arguments, if the caller has it already.
    """
    if table is None:
        table = lookup_table(bits, form, dtype, codes.device)
    groups = scale.shape[1]
    weight = torch.nn.functional.embedding(codes.int(), table).view(codes.shape[0], groups, -1)
    scale = scale.to(table.dtype)[..., None]
    if form == "symmetric":
        weight.mul_(scale)
    elif form == "affine":
        weight.mul_(scale).add_(shift.to(table.dtype)[..., None])
    else:
        weight.sub_(shift.to(table.dtype)[..., None]).mul_(scale)
    return weight.view(codes.shape[0], -1).to(dtype)


def lookup_table(bits: int, form: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Byte -> values, in the dtype the dequantisation is computed in (see the module docstring)."""
    exact = form == "symmetric" and bits <= 2
    wide = dtype if exact or dtype == torch.float64 else torch.float32
    return _byte_table(bits, form == "symmetric", wide, device)


@torch.library.custom_op("bonsai_image::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bits: int,
    form: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x @ W.T + bias`` for ``x`` of shape ``(..., K)``; the result has shape ``(..., N)`` and the dtype of ``x``.

    A custom operator, so that ``torch.compile`` sees one call and not an unrolled loop over blocks.
    """
    n, k = codes.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    out = x.new_empty(rows.shape[0], n)
    if rows.shape[0] > 0:
        table = lookup_table(bits, form, x.dtype, x.device)
        elements = CPU_BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
        step = max(1, elements // k)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            weight = dequantize(codes[part], scale[part], None if shift is None else shift[part], bits, form,
                                x.dtype, table)
            torch.mm(rows, weight.t(), out=out[:, part])
        if bias is not None:
            out += bias.to(out.dtype)
    return out.view(*x.shape[:-1], n)


@packed_linear.register_fake
def _(x, codes, scale, shift, bits, form, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_for_backward(ctx, inputs, output):
    _, ctx.codes, ctx.scale, ctx.shift, ctx.bits, ctx.form, _ = inputs


def _backward(ctx, grad):
    """Only the activations have a gradient: the codes are not trainable."""
    weight = dequantize(ctx.codes, ctx.scale, ctx.shift, ctx.bits, ctx.form, grad.dtype)
    return grad @ weight, None, None, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_save_for_backward)


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``(..., K)`` and a packed ``weight`` ``(N, K)``, in the dtype of ``x``."""
    params = weight._params
    return packed_linear(x, weight._qdata, params.scale, params.shift, params.bits, params.form, bias)


def embedding(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bits: int,
    form: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a packed embedding table: ``(...)`` integer indices -> ``(..., K)`` in ``dtype``."""
    flat = indices.reshape(-1)
    rows = dequantize(codes[flat], scale[flat], None if shift is None else shift[flat], bits, form, dtype)
    return rows.view(*indices.shape, -1)


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies BF16 matrices in hardware (x86 with AVX512-BF16 or AMX).

    With AVX512-BF16, BF16 measured 4 times as fast as FP32, and FP16 3 times slower than FP32. Older releases of
    torch cannot tell (``get_capabilities`` is missing); then the answer is no.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
