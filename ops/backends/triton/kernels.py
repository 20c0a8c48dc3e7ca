"""Triton kernels over the canonical packed form (``ops/packed.py``). Launch configurations are fixed: nothing is tuned
at run time, and no kernel is compiled anew for another number of rows.

``expand``
    Codes to a dense weight, or to int8 levels. Codes ``(N, K * bits / 8)`` and scales ``(N, K / group)`` are both
    contiguous and a group fills whole words of 8 elements, so word ``i`` of the weight has scale ``i // group_words``:
    rows need no arithmetic, and the result equals ``packed.dequantize`` bit for bit.
``quantize``
    Activations ``(M, K)`` to int8 digits with one float32 step for each row and group.
``int8_matmul``
    The product of digits and levels (``ops/backends/interface.py``). A step along K is a group: the dot of the high
    digits, shifted by 7 bits, is what that of the low ones starts from. Both are exact; only the sum over groups is
    rounded, in float32.
"""

import torch
import triton
import triton.language as tl

from ...packed import LEVELS, Packed
from ..interface import LARGEST, OUTLYING, SMALLEST, Digits

#: Words of codes that one program of ``expand`` reads. A word holds 8 elements (1 bit: a byte, 2 bits: two, 4 bits:
#: four), which a thread stores at once: 16 bytes in 16 bits, 8 bytes of levels.
EXPAND_WORDS = 512
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

#: Rows and columns of the result that one program of ``int8_matmul`` computes. Launched as below, it compiles without
#: spilling registers for every architecture and number of digits; with two digits 128 x 128 on 8 warps and 128 x 64
#: spill on all before Hopper, and 64 x 128 with a third stage does on sm_80.
TILE_M, TILE_N = 64, 128

#: Row tiles that share a column tile of ``int8_matmul`` in L2.
TILE_ROWS = 8

#: How the three kernels are launched. Floating-point fusion is off where it would change a result: a fused
#: multiply-add would round an affine weight once where the reference rounds twice, and would skip the rounding of an
#: activation before its rounding constant is added.
EXPAND_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ROWS_LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
MATMUL_LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

#: Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, half to even.
ROUNDING = tl.constexpr(12582912.0)
#: The bits of that float32. An int32 sum of magnitude below 2**22 that starts at it is, read as float32, 1.5 * 2**23
#: more than the sum: one subtraction replaces the conversion, which is slow on sm_80.
ROUNDING_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _expand(words, scale, shift, out, total, GROUP_WORDS: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr,
            STEP: tl.constexpr, ORIGIN: tl.constexpr, BLOCK: tl.constexpr):
    dtype = out.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    lane = tl.arange(0, 8)
    word = tl.load(words + index, mask=inside, other=0).to(tl.int32)
    value = (word[:, None] >> (lane * BITS)[None, :]) & (2**BITS - 1)
    group = (index // GROUP_WORDS).to(tl.int32)
    if FORM == "levels" or FORM == "symmetric":
        value = value * STEP - ORIGIN
    if FORM != "levels":
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


def expand(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out``, contiguous ``(N, K)``, in BF16, FP16 or FP32 with the weight, in int8 with the unscaled levels
    (``packed.LEVELS``) of a symmetric one. The parts of ``packed`` are contiguous, its group is a multiple of 8."""
    step, origin = LEVELS[packed.bits]
    words = packed.codes.view(_WORDS[packed.bits])
    form = "levels" if out.dtype == torch.int8 else packed.form
    grid = (triton.cdiv(words.numel(), EXPAND_WORDS),)
    _expand[grid](words, packed.scale, packed.shift, out, words.numel(), packed.group // 8, packed.bits, form, step,
                  origin, EXPAND_WORDS, **EXPAND_LAUNCH)
    return out


@triton.jit(do_not_specialize=["m", "tiles"])
def _quantize(x, q, step, second, m, k, groups, stride, tiles, GROUP: tl.constexpr, GROUPS: tl.constexpr,
              BLOCK_M: tl.constexpr, DIGITS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
              OUTLYING: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + row * stride + element, mask=inside[:, None], other=0).to(tl.float32)
    amax = tl.max(tl.abs(values), axis=1)
    nonzero = amax > SMALLEST
    inverse = tl.where(nonzero, tl.div_rn(LARGEST, tl.where(nonzero, amax, 1.0)), 0.0)
    two = inside & (DIGITS == 2)
    if DIGITS == "adaptive":
        two = amax > OUTLYING * tl.sqrt_rn(tl.sum(tl.sum(values * values, axis=1), axis=0) / k)
        tl.store(second + group * tiles + row // BLOCK_M, 1, mask=inside & two)
    one = ((values * (inverse * (1 / 128))[:, None] + ROUNDING) - ROUNDING).to(tl.int32) * 128
    if DIGITS != 1:
        both = ((values * inverse[:, None] + ROUNDING) - ROUNDING).to(tl.int32)
        one = tl.where(two[:, None], both, one)
    high = (one + 64) >> 7
    tl.store(q + row * k + element, high.to(tl.int8), mask=inside[:, None])
    if DIGITS != 1:
        tl.store(q + (m + row) * k + element, (one - (high << 7)).to(tl.int8), mask=inside[:, None])
    tl.store(step + group * m + row, tl.div_rn(amax, LARGEST), mask=inside)


def quantize(x: torch.Tensor, group: int, digits: Digits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``interface.quantize`` of ``x`` ``(M, K)``, rows contiguous.

    Returns the digits, int8 ``(1 or 2, M, K)``, ``step`` float32 ``(K / group, M)``, and int32 ``(K / group, tiles of
    rows)``, which is not 0 where a row of a tile has a second digit; it is filled for "adaptive" alone.
    """
    m, k = x.shape
    groups, tiles = k // group, triton.cdiv(m, TILE_M)
    q = torch.empty(1 if digits == 1 else 2, m, k, dtype=torch.int8, device=x.device)
    step = torch.empty(groups, m, dtype=torch.float32, device=x.device)
    second = torch.zeros(groups, tiles, dtype=torch.int32, device=x.device)
    _quantize[(m,)](x, q, step, second, m, k, groups, x.stride(0), tiles, group, triton.next_power_of_2(groups), TILE_M,
                    digits, LARGEST, SMALLEST, OUTLYING, **ROWS_LAUNCH)
    return q, step, second


@triton.jit(do_not_specialize=["m", "tiles"])
def _int8_matmul(q, step, second, levels, scale, out, m, n, k, stride, tiles, GROUP: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, DIGITS: tl.constexpr):
    tiles_n = tl.cdiv(n, BLOCK_N)
    band, within = tl.program_id(0) // (ROWS * tiles_n), tl.program_id(0) % (ROWS * tiles_n)
    height = tl.minimum(tiles - band * ROWS, ROWS)
    tile = band * ROWS + within % height
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = ((within // height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    # Indices beyond the matrix wrap around instead of masking every load; what they compute is never stored.
    left, right = rows % m, columns % n
    depth = tl.arange(0, GROUP)
    q += left[:, None] * k + depth[None, :]
    low = q + m.to(tl.int64) * k
    levels += right[None, :] * k + depth[:, None]
    scale += right
    step += left
    second += tile
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, k, GROUP):
        weight = tl.load(levels)
        exact = (tl.dot(tl.load(q), weight, out_dtype=tl.int32) << 7) + ROUNDING_BITS
        if DIGITS == 2:
            exact = tl.dot(tl.load(low), weight, exact, out_dtype=tl.int32)
        if DIGITS == "adaptive":
            # Loaded outside of the branch, where the loop can load ahead.
            needed = tl.load(second) != 0
            digit = tl.load(low, mask=needed, other=0)
            if needed:
                exact = tl.dot(digit, weight, exact, out_dtype=tl.int32)
        factor = tl.load(step)[:, None] * tl.load(scale).to(tl.float32)[None, :]
        total += (exact.to(tl.float32, bitcast=True) - ROUNDING) * factor
        q += GROUP
        low += GROUP
        levels += GROUP
        scale += n
        step += m
        second += tiles
    tl.store(out + rows[:, None] * stride + columns[None, :], total.to(out.dtype.element_ty),
             mask=(rows < m)[:, None] & (columns < n)[None, :])


def int8_matmul(q: torch.Tensor, step: torch.Tensor, second: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor,
                out: torch.Tensor, digits: Digits) -> torch.Tensor:
    """Fill ``out`` ``(M, N)``, rows contiguous, from what :func:`quantize` returns and int8 ``levels`` ``(N, K)`` of
    magnitude 2 at most with ``scale`` ``(K / group, N)``, group a power of 2 from 32 to 128."""
    (_, m, k), n, tiles = q.shape, levels.shape[0], second.shape[1]
    _int8_matmul[(tiles * triton.cdiv(n, TILE_N),)](
        q, step, second, levels, scale, out, m, n, k, out.stride(0), tiles, k // scale.shape[0], TILE_M, TILE_N,
        TILE_ROWS, digits, **MATMUL_LAUNCH)
    return out
