"""Triton kernels over the canonical packed form (``ops/packed.py``). Launch configurations are fixed: nothing is tuned
at run time, and no kernel is compiled anew for another number of rows.

``expand``
    Codes to a dense weight, or to int8 levels. Codes ``(N, K * bits / 8)`` and scales ``(N, K / group)`` are both
    contiguous and a group fills whole bytes, so byte ``i`` of the weight has scale ``i // group_bytes``: rows need
    no arithmetic, and the result equals ``packed.dequantize`` bit for bit.
``quantise_rows``
    Activations ``(M, K)`` to int8 with one float32 scale a row: ``q = round(x * (127 / amax))``, half to even.
``int8_matmul``
    ``out[m, n] = row[m] * sum over groups g of scale[g, n] * (int32 dot of q and levels inside g)``. The dot is exact;
    only the sum over groups is rounded, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packed import LEVELS, Packed

#: Bytes of codes that one program of ``expand`` reads.
EXPAND_BYTES = 1024

#: Rows and columns of an output tile of ``int8_matmul``, and how many row tiles share a column tile in L2. With groups
#: of 128 this compiles to 64 KB of shared memory (96 KB on Hopper); every card since Ampere has 99 KB or more.
TILE_M, TILE_N, TILE_ROWS = 128, 128, 8

#: How the three kernels are launched. Floating-point fusion is off where it would change a result: a fused
#: multiply-add would round an affine weight once where the reference rounds twice, and would skip the rounding of an
#: activation before its rounding constant is added.
EXPAND_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ROWS_LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
MATMUL_LAUNCH = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}

#: Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, half to even.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _expand(codes, scale, shift, out, total, GROUP_BYTES: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr,
            STEP: tl.constexpr, ORIGIN: tl.constexpr, BLOCK: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    dtype = out.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    lane = tl.arange(0, PER)
    byte = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
    value = (byte[:, None] >> (lane * BITS)[None, :]) & (2**BITS - 1)
    if FORM == "levels" or FORM == "symmetric":
        value = value * STEP - ORIGIN
    if FORM != "levels":
        factor = tl.load(scale + index // GROUP_BYTES, mask=inside, other=0)
        if FORM == "symmetric" and BITS <= 2:
            factor = factor.to(dtype)
        value = value.to(tl.float32)
        if FORM == "zeropoint":
            value = value - tl.load(shift + index // GROUP_BYTES, mask=inside, other=0).to(tl.float32)[:, None]
        value = value * factor.to(tl.float32)[:, None]
        if FORM == "affine":
            value = value + tl.load(shift + index // GROUP_BYTES, mask=inside, other=0).to(tl.float32)[:, None]
    tl.store(out + index[:, None] * PER + lane[None, :], value.to(dtype), mask=inside[:, None])


def expand(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out``, contiguous ``(N, K)``, with the weight, or with its unscaled levels (``packed.LEVELS``) if ``out``
    is int8; else it is BF16, FP16 or FP32. The parts of ``packed`` are contiguous."""
    codes, scale, shift, bits, form = packed
    step, origin = LEVELS[bits]
    group_bytes = codes.shape[1] // scale.shape[1]
    grid = (triton.cdiv(codes.numel(), EXPAND_BYTES),)
    _expand[grid](codes, scale, shift, out, codes.numel(), group_bytes, bits,
                  "levels" if out.dtype == torch.int8 else form, step, origin, EXPAND_BYTES, **EXPAND_LAUNCH)
    return out


@triton.jit
def _quantise_rows(x, q, row, k, stride, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < k
    values = tl.load(x + m * stride + columns, mask=inside, other=0).to(tl.float32)
    amax = tl.max(tl.abs(values), axis=0)
    inverse = tl.where(amax > 0, tl.div_rn(127.0, tl.where(amax > 0, amax, 1.0)), 0.0)
    rounded = (values * inverse + ROUNDING) - ROUNDING
    tl.store(q + m * k + columns, rounded.to(tl.int8), mask=inside)
    tl.store(row + m, tl.div_rn(amax, 127.0))


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``(M, K)``, rows contiguous -> int8 ``(M, K)`` and float32 ``(M,)`` with ``x ~ q * row[:, None]``."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    row = torch.empty(m, dtype=torch.float32, device=x.device)
    _quantise_rows[(m,)](x, q, row, k, x.stride(0), triton.next_power_of_2(k), **ROWS_LAUNCH)
    return q, row


@triton.jit(do_not_specialize=["m"])
def _int8_matmul(q, row, levels, scale, out, m, n, k, stride, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band, within = tl.program_id(0) // (ROWS * tiles_n), tl.program_id(0) % (ROWS * tiles_n)
    height = tl.minimum(tiles_m - band * ROWS, ROWS)
    rows = ((band * ROWS + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = ((within // height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    # Indices beyond the matrix wrap around instead of masking every load; what they compute is never stored.
    left, right = rows % m, columns % n
    depth = tl.arange(0, GROUP)
    q += left[:, None] * k + depth[None, :]
    levels += right[None, :] * k + depth[:, None]
    scale += right
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, k, GROUP):
        exact = tl.dot(tl.load(q), tl.load(levels), out_dtype=tl.int32)
        total += exact.to(tl.float32) * tl.load(scale).to(tl.float32)[None, :]
        q += GROUP
        levels += GROUP
        scale += n
    total = total * tl.load(row + left)[:, None]
    tl.store(out + rows[:, None] * stride + columns[None, :], total.to(out.dtype.element_ty),
             mask=(rows < m)[:, None] & (columns < n)[None, :])


def int8_matmul(q: torch.Tensor, row: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor,
                out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` ``(M, N)``, rows contiguous, from int8 ``q`` ``(M, K)`` with ``row`` ``(M,)`` and int8 ``levels``
    ``(N, K)`` with ``scale`` ``(K / group, N)``, group a power of 2 of at least 32."""
    (m, k), n = q.shape, levels.shape[0]
    grid = (triton.cdiv(m, TILE_M) * triton.cdiv(n, TILE_N),)
    _int8_matmul[grid](q, row, levels, scale, out, m, n, k, out.stride(0), k // scale.shape[0], TILE_M, TILE_N,
                       TILE_ROWS, **MATMUL_LAUNCH)
    return out
