"""Triton kernels over the canonical packed form (``ops/packed.py``). Launch configurations are fixed: nothing is tuned
at run time, and no kernel is compiled anew for another number of rows.

``expand``
    Codes to a dense weight, or to int8 levels. Codes ``(N, K * bits / 8)`` and scales ``(N, K / group)`` are both
    contiguous and a group fills whole words of 8 elements, so word ``i`` of the weight has scale ``i // group_words``:
    rows need no arithmetic, and the result equals ``packed.dequantize`` bit for bit.
``quantise_rows``
    Activations ``(M, K)`` to int8 with one float32 scale a row: ``q = round(x * (127 / amax))``, half to even.
``int8_matmul``
    ``out[m, n] = row[m] * sum over groups g of scale[g, n] * (int32 dot of q and levels inside g)``. The dot is exact;
    only the sum over groups is rounded, in float32.
"""

import torch
import triton
import triton.language as tl

from ...packed import LEVELS, Packed
from ..tuning import Tile

#: Words of codes that one program of ``expand`` reads. A word holds 8 elements (1 bit: a byte, 2 bits: two, 4 bits:
#: four), which a thread stores at once: 16 bytes in 16 bits, 8 bytes of levels.
EXPAND_WORDS = 512
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

#: Row tiles that share a column tile of ``int8_matmul`` in L2.
TILE_ROWS = 8

#: How the three kernels are launched. Floating-point fusion is off where it would change a result: a fused
#: multiply-add would round an affine weight once where the reference rounds twice, and would skip the rounding of an
#: activation before its rounding constant is added.
EXPAND_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ROWS_LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
MATMUL_LAUNCH = {"enable_fp_fusion": True}

#: Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, half to even.
ROUNDING = tl.constexpr(12582912.0)
#: The bits of that float32. An int32 sum of magnitude below 2**22 that starts at it is, read as float32, 1.5 * 2**23
#: more than the sum: one subtraction replaces the conversion, which is slow on sm_80.
ROUNDING_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _expand(words, scale, shift, out, scale_t, total, n, groups, GROUP_WORDS: tl.constexpr, BITS: tl.constexpr,
            FORM: tl.constexpr, STEP: tl.constexpr, ORIGIN: tl.constexpr, BLOCK: tl.constexpr):
    dtype = out.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    lane = tl.arange(0, 8)
    word = tl.load(words + index, mask=inside, other=0).to(tl.int32)
    value = (word[:, None] >> (lane * BITS)[None, :]) & (2**BITS - 1)
    group = (index // GROUP_WORDS).to(tl.int32)
    if FORM == "levels" or FORM == "symmetric":
        value = value * STEP - ORIGIN
    if FORM == "levels":
        first = inside & (index % GROUP_WORDS == 0)
        tl.store(scale_t + group % groups * n + group // groups, tl.load(scale + group, mask=first), mask=first)
    else:
        factor = tl.load(scale + group, mask=inside, other=0)
        if FORM == "symmetric" and BITS <= 2:
            factor = factor.to(dtype)
        value = value.to(tl.float32)
        if FORM == "zeropoint":
            value = value - tl.load(shift + group, mask=inside, other=0).to(tl.float32)[:, None]
        value = value * factor.to(tl.float32)[:, None]
        if FORM == "affine":
            value = value + tl.load(shift + group, mask=inside, other=0).to(tl.float32)[:, None]
    tl.store(out + index[:, None] * 8 + lane[None, :], value.to(dtype), mask=inside[:, None])


def expand(packed: Packed, out: torch.Tensor, scale_t: torch.Tensor | None = None) -> torch.Tensor:
    """Fill ``out``, contiguous ``(N, K)`` in BF16, FP16 or FP32, with the weight. The parts of ``packed`` are
    contiguous, and its group is a multiple of 8. With ``scale_t``, see :func:`expand_levels`."""
    step, origin = LEVELS[packed.bits]
    words = packed.codes.view(_WORDS[packed.bits])
    form = packed.form if scale_t is None else "levels"
    grid = (triton.cdiv(words.numel(), EXPAND_WORDS),)
    _expand[grid](words, packed.scale, packed.shift, out, scale_t, words.numel(), packed.n, packed.scale.shape[1],
                  packed.group // 8, packed.bits, form, step, origin, EXPAND_WORDS, **EXPAND_LAUNCH)
    return out


def expand_levels(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The unscaled levels (``packed.LEVELS``) of a symmetric weight, int8 ``(N, K)``, and its scales transposed,
    ``(K / group, N)``."""
    scale_t = packed.scale.new_empty(packed.scale.shape[::-1])
    return expand(packed, packed.codes.new_empty(packed.n, packed.k, dtype=torch.int8), scale_t), scale_t


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
        exact = tl.dot(tl.load(q), tl.load(levels), tl.full((BLOCK_M, BLOCK_N), ROUNDING_BITS, tl.int32),
                       out_dtype=tl.int32)
        total += (exact.to(tl.float32, bitcast=True) - ROUNDING) * tl.load(scale).to(tl.float32)[None, :]
        q += GROUP
        levels += GROUP
        scale += n
    total = total * tl.load(row + left)[:, None]
    tl.store(out + rows[:, None] * stride + columns[None, :], total.to(out.dtype.element_ty),
             mask=(rows < m)[:, None] & (columns < n)[None, :])


def int8_matmul(q: torch.Tensor, row: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, out: torch.Tensor,
                tile: Tile) -> torch.Tensor:
    """Fill ``out`` ``(M, N)``, rows contiguous, from int8 ``q`` ``(M, K)`` with ``row`` ``(M,)`` and int8 ``levels``
    ``(N, K)`` with ``scale`` ``(K / group, N)``, group a power of 2 of at least 32."""
    (m, k), n = q.shape, levels.shape[0]
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    _int8_matmul[grid](q, row, levels, scale, out, m, n, k, out.stride(0), k // scale.shape[0], tile.m, tile.n,
                       TILE_ROWS, num_warps=tile.warps, num_stages=tile.stages, **MATMUL_LAUNCH)
    return out
