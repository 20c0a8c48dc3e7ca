"""The instruction sets we compile for, and the kernels they share: expansion, and activations to int8 digits.

In int8 products the codes are not put in order: a 32-bit word of them, shifted right by ``bits * j`` and masked, has
element ``b * per_byte + j`` in byte ``b``. Instead :func:`quantize` puts the activations in that order, once for all
columns.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import llvmlite.binding as llvm
from llvmlite import ir

from ...packed import LEVELS
from ..interface import LARGEST, OUTLYING, SMALLEST, Digits
from .llvm import F32, I8, I16, I32, I64, POINTER, VECTOR, Builder, compiled, const

#: Arguments of a kernel when it runs, with their types.
Address: TypeAlias = Annotated[ir.Value, POINTER]
Integer: TypeAlias = Annotated[ir.Value, I64]


class Kind(NamedTuple):
    """An instruction that multiplies bytes: what the CPU must have, and the block of results that it adds up."""

    needs: str = ""  #: LLVM's names of the features to look for
    cpu: str = ""  #: LLVM's name of a CPU with all of them but ``features``; empty: this machine's
    features: str = ""
    lanes: int = 0  #: of 32 bits in a vector
    rows: int = 0  #: of activations in a block
    vectors: int = 0  #: of columns in a block
    blocks: int = 0  #: of rows that share the panel of a group in the L1 cache
    tile: int = 0  #: rows of activations that lie together

    @property
    def columns(self) -> int:
        return self.lanes * self.vectors

    @property
    def sums(self) -> int:
        """Bytes of the sums of all blocks, and of two squares of two digits of AMX."""
        return 4 * self.rows * self.blocks * self.columns + (16384 if self.tile == 16 else 0)


#: Best first. ``amx`` multiplies tiles of 16 x 64 signed bytes. The next three add four products to each 32-bit lane,
#: of unsigned codes and signed activations: in one instruction, or for ``avx2`` through sums of 16 bits. Their blocks
#: fill the registers (measured best of five and of four shapes). ``portable`` has no int8 product: no such CPU is
#: measured.
KINDS = {
    "amx": Kind("amx-int8 avx512vnni avx512bw", "x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8", 16, 64, 4, 1, 16),
    "vnni512": Kind("avx512vnni avx512bw avx512dq avx512vl", "x86-64-v4", "+avx512vnni", 16, 8, 3, 4, 8),
    "vnni256": Kind("avxvnni avx2 fma bmi2", "x86-64-v3", "+avxvnni", 8, 6, 2, 4, 6),
    "avx2": Kind("avx2 fma bmi2", "x86-64-v3", "", 8, 6, 2, 4, 6),
    "portable": Kind(),
}


def function(kernel: Callable[..., None], kind: str, /, **constants: Any) -> Callable[[Any], None]:
    """A kernel below, compiled for a kind."""
    return compiled(kernel, KINDS[kind].cpu, KINDS[kind].features, **constants)


def kinds() -> list[str]:
    """The names in :data:`KINDS` that this machine has the features for, best first."""
    features = llvm.get_host_cpu_features()
    return [name for name, kind in KINDS.items() if all(features.get(need) for need in kind.needs.split())]


def expand(b: Builder, _worker: Integer, piece: Integer, codes: Address, stride: Integer, scale: Address,
           shift: Address, out: Address, rows: Integer, step: Integer, groups: Integer, words: Integer, *, bits: int,
           form: str, wide: bool) -> None:
    """``rows`` rows of ``groups`` groups of ``32 * words`` codes -> BF16, or float32 if ``wide``, by ``step`` rows.

    ``stride``: bytes between rows of codes. ``scale``, ``shift``: float32 ``(rows, groups)``.
    """
    first = b.times(piece, step)
    with b.loop(b.times(b.least(step, b.sub(rows, first)), groups)) as within:
        i = b.plus(b.times(first, groups), within)
        n, g = b.udiv(i, groups), b.urem(i, groups)
        s, z = b.splat(b.read(scale, F32, i), 16), b.splat(b.read(shift, F32, i), 16)
        source = b.at(codes, I8, b.plus(b.times(n, stride), b.times(g, words, 4 * bits)))
        target = b.at(out, F32 if wide else I16, b.times(i, words, 32))
        with b.loop(words) as word:
            loaded = b.read(b.at(source, I8, b.times(word, 4 * bits)), I32, 0, bits)
            for lanes in (range(16), range(16, 32)):
                v = b.shuffle(loaded, loaded, [i * bits // 32 for i in lanes])
                v = b.and_(b.lshr(v, const(16, I32, [i * bits % 32 for i in lanes])), const(16, I32, 2**bits - 1))
                if form == "symmetric":
                    factor, origin = LEVELS[bits]
                    v = b.sub(b.mul(v, const(16, I32, factor)), const(16, I32, origin))
                v = b.sitofp(v, VECTOR(F32, 16))
                v = b.fmul(b.fsub(v, z), s) if form == "zeropoint" else b.fmul(v, s)
                v = b.fadd(v, z) if form == "affine" else v
                b.write(v if wide else b.bfloat16(v), target, F32 if wide else I16, b.plus(b.times(word, 32), lanes[0]))


def activations(b: Builder, source: ir.Value, index: ir.Value, wide: bool) -> ir.Value:
    """16 activations from ``index`` on as floats."""
    if wide:
        return b.read(source, F32, index, 16)
    half = b.zext(b.read(source, I16, index, 16), VECTOR(I32, 16))
    return b.bitcast(b.shl(half, const(16, I32, 16)), VECTOR(F32, 16))


def quantize(b: Builder, _worker: Integer, piece: Integer, x: Address, stride: Integer, q: Address, plane: Integer,
             step: Address, total: Address, second: Address, rows: Integer, size: Integer, groups: Integer, *,
             bits: int, form: str, group: int, block: int, tile: int, wide: bool, digits: Digits) -> None:
    """``interface.quantize`` of ``rows`` rows of ``x`` (BF16, or float32 if ``wide``), ``size`` of them a piece.

    ``stride``: elements between rows of ``x``. With ``t`` for a row's tile and ``r`` for its place there:

    ``q`` int8 ``[digit][t][groups][group / 64][tile][64]``
        the high digits, and ``plane`` bytes behind them the low ones.
    ``step`` float32 ``[t][groups][tile]``
    ``total`` 32 bits ``[t][groups][tile]``
        for symmetric weights int32, minus the sum of the activations times the code of level 0: what a sum of products
        with codes starts from. For others float32, the sum of the activations, which the shift multiplies.
    ``second`` int32 ``[rows / block][groups]``
        not 0 where a row of the block has a second digit; ``size`` is a multiple of ``block``.
    """
    first = b.times(piece, size)
    with b.loop(b.least(size, b.sub(rows, first))) as offset:
        m = b.plus(first, offset)
        source = b.at(x, F32 if wide else I16, b.times(m, stride))
        t, r = b.udiv(m, I64(tile)), b.urem(m, I64(tile))
        largest = outlying(b, source, groups, group, wide) if digits == "adaptive" else None
        with b.loop(groups) as g:
            values = [activations(b, source, b.plus(b.times(g, group), 16 * i), wide) for i in range(group // 16)]
            amax = magnitude(b, values)
            two = ir.Constant(ir.IntType(1), digits == 2) if largest is None else b.fcmp_ordered(">", amax, largest)
            values = integers(b, values, amax, two)
            high = [b.ashr(b.add(v, const(16, I32, 64)), const(16, I32, 7)) for v in values]
            low = [b.sub(v, b.shl(h, const(16, I32, 7))) for v, h in zip(values, high, strict=True)]
            at = b.plus(b.times(t, groups), g)
            for target, part in ((q, high), (b.at(q, I8, plane), low))[: 1 if digits == 1 else 2]:
                for i, v in enumerate(in_order_of_codes(b, part, bits)):
                    within = b.plus(b.times(at, group * tile), b.times(r, 64), 16 * i // 64 * 64 * tile + 16 * i % 64)
                    b.write(b.trunc(v, VECTOR(I8, 16)), target, I8, within)
            at = b.plus(b.times(at, tile), r)
            unit = b.fdiv(amax, F32(LARGEST))
            b.write(unit, step, F32, at)
            summed = b.intrinsic("llvm.vector.reduce.add.v16i32", I32, functools.reduce(b.add, values))
            if form == "symmetric":
                b.write(b.mul(summed, I32(-LEVELS[bits][1])), total, I32, at)
            else:
                b.write(b.fmul(b.sitofp(summed, F32), unit), total, F32, at)
            if digits == "adaptive":
                at = b.plus(b.times(b.udiv(m, I64(block)), groups), g)
                b.write(b.or_(b.read(second, I32, at), b.zext(two, I32)), second, I32, at)


def outlying(b: Builder, source: ir.Value, groups: ir.Value, group: int, wide: bool) -> ir.Value:
    """The magnitude above which a group of the row has a second digit."""
    vf = VECTOR(F32, 16)
    squares = b.variable(const(16, F32, 0.0))
    with b.loop(b.times(groups, group // 16)) as i:
        v = activations(b, source, b.times(i, 16), wide)
        b.store(b.intrinsic("llvm.fma.v16f32", vf, v, v, b.get(squares)), squares)
    total = b.intrinsic("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), b.get(squares))
    mean = b.fdiv(total, b.uitofp(b.times(groups, group), F32))
    return b.fmul(b.intrinsic("llvm.sqrt.f32", F32, mean), F32(OUTLYING))


def magnitude(b: Builder, values: list[ir.Value]) -> ir.Value:
    """The largest in magnitude; NaN if there is one."""
    # The bits of floats without their sign are in the order of the floats, and NaN is above infinity.
    v32 = VECTOR(I32, 16)
    bits = [b.and_(b.bitcast(v, v32), const(16, I32, 0x7FFFFFFF)) for v in values]
    most = functools.reduce(lambda x, y: b.intrinsic("llvm.smax.v16i32", v32, x, y), bits)
    return b.bitcast(b.intrinsic("llvm.vector.reduce.smax.v16i32", I32, most), F32)


def integers(b: Builder, values: list[ir.Value], amax: ir.Value, two: ir.Value) -> list[ir.Value]:
    """A group in units of its step: 15 bits if ``two`` digits, else 8 bits, shifted by 7."""
    inverse = b.select(b.fcmp_ordered(">", amax, F32(SMALLEST)), b.fdiv(F32(LARGEST), amax), F32(0.0))
    inverse = b.splat(b.select(two, inverse, b.fmul(inverse, F32(1 / 128))), 16)
    shift = b.splat(b.select(two, I32(0), I32(7)), 16)
    rounded = [b.intrinsic("llvm.rint.v16f32", v.type, b.fmul(v, inverse)) for v in values]
    return [b.shl(b.fptosi(v, VECTOR(I32, 16)), shift) for v in rounded]


def in_order_of_codes(b: Builder, values: list[ir.Value], bits: int) -> list[ir.Value]:
    """Vectors of 16 elements along K -> the same in the order in which :func:`products.decode` has the codes: place p
    of a word of codes is byte p % 4 at shift p // 4."""
    per_byte, span, found = 8 // bits, 32 // bits, []
    for i in range(len(values)):
        places = [divmod(16 * i + lane, span) for lane in range(16)]
        order = [word * span + p % 4 * per_byte + p // 4 for word, p in places]
        low = min(order) // 16
        found.append(b.shuffle(values[low], values[min(low + 1, len(values) - 1)], [k - 16 * low for k in order]))
    return found
