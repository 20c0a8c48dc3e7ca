"""The instructions that a CPU may have, and the kernels that need none in particular: expansion and rounding to int8.

In int8 products the codes are not put in order: a 32-bit word of them, shifted right by ``bits * j`` and masked, has
element ``b * per_byte + j`` in byte ``b``. Instead :func:`quantise` puts the activations in that order, once for all
columns.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import llvmlite.binding as llvm
from llvmlite import ir

from ...packed import LEVELS
from .llvm import F32, I8, I16, I32, I64, POINTER, VECTOR, Builder, compiled, const

#: Arguments of a kernel when it runs, with their types.
Address: TypeAlias = Annotated[ir.Value, POINTER]
Integer: TypeAlias = Annotated[ir.Value, I64]

#: Elements along K that share a scale, the only size that ``multiply`` handles.
GROUP = 128


class Kind(NamedTuple):
    """An instruction that multiplies bytes: what the CPU must have, and the block of results that it adds up."""

    needs: str = ""  #: LLVM's names of the features to look for
    cpu: str = ""  #: LLVM's name of a CPU with all of them but ``features``; empty: this machine's
    features: str = ""
    lanes: int = 0  #: of 32 bits in a vector
    rows: int = 0  #: of activations in a block
    vectors: int = 0  #: of columns in a block
    tile: int = 0  #: rows of activations that lie together

    @property
    def columns(self) -> int:
        return self.lanes * self.vectors


#: Best first. ``amx`` multiplies tiles of 16 x 64 signed bytes. The next three add four products to each 32-bit lane,
#: of unsigned codes and signed activations: in one instruction, or for ``avx2`` through sums of 16 bits. Their blocks
#: fill the registers (measured best of five and of four shapes). ``portable`` has no int8 product: no such CPU is
#: measured.
KINDS = {
    "amx": Kind("amx-int8 avx512vnni avx512bw", "x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8", 16, 64, 4, 16),
    "vnni512": Kind("avx512vnni avx512bw avx512dq avx512vl", "x86-64-v4", "+avx512vnni", 16, 8, 3, 8),
    "vnni256": Kind("avxvnni avx2 fma bmi2", "x86-64-v3", "+avxvnni", 8, 6, 2, 6),
    "avx2": Kind("avx2 fma bmi2", "x86-64-v3", "", 8, 6, 2, 6),
    "portable": Kind(),
}


def function(kernel: Callable[..., None], kind: str, /, **constants: Any) -> Callable[..., None]:
    """A kernel below, compiled for a kind."""
    return compiled(kernel, KINDS[kind].cpu, KINDS[kind].features, **constants)


def kinds() -> list[str]:
    """The names in :data:`KINDS` that this machine has the features for, best first."""
    features = llvm.get_host_cpu_features()
    return [name for name, kind in KINDS.items() if all(features.get(need) for need in kind.needs.split())]


def expand(b: Builder, codes: Address, stride: Integer, scale: Address, shift: Address, out: Address, rows: Integer,
           groups: Integer, steps: Integer, *, bits: int, form: str, wide: bool) -> None:
    """``rows`` rows of ``groups`` groups of ``32 * steps`` codes -> BF16, or float32 if ``wide``.

    ``stride``: bytes between rows of codes. ``scale``, ``shift``: float32 ``(rows, groups)``.
    """
    with b.loop(b.times(rows, groups)) as i:
        n, g = b.udiv(i, groups), b.urem(i, groups)
        s, z = b.splat(b.read(scale, F32, i), 16), b.splat(b.read(shift, F32, i), 16)
        source = b.at(codes, I8, b.plus(b.times(n, stride), b.times(g, steps, 4 * bits)))
        target = b.at(out, F32 if wide else I16, b.times(i, steps, 32))
        with b.loop(steps) as step:
            words = b.read(b.at(source, I8, b.times(step, 4 * bits)), I32, 0, bits)
            for lanes in (range(16), range(16, 32)):
                v = b.shuffle(words, words, [i * bits // 32 for i in lanes])
                v = b.and_(b.lshr(v, const(16, I32, [i * bits % 32 for i in lanes])), const(16, I32, 2**bits - 1))
                if form == "symmetric":
                    factor, origin = LEVELS[bits]
                    v = b.sub(b.mul(v, const(16, I32, factor)), const(16, I32, origin))
                v = b.sitofp(v, VECTOR(F32, 16))
                v = b.fmul(b.fsub(v, z), s) if form == "zeropoint" else b.fmul(v, s)
                v = b.fadd(v, z) if form == "affine" else v
                b.write(v if wide else b.bfloat16(v), target, F32 if wide else I16, b.plus(b.times(step, 32), lanes[0]))


def quantise(b: Builder, x: Address, stride: Integer, q: Address, row: Address, start: Address, first: Integer,
             rows: Integer, groups: Integer, *, bits: int, tile: int, wide: bool) -> None:
    """Rows ``first`` to ``first + rows`` of ``x`` (BF16, or float32 if ``wide``) -> int8 by ``int8_reference``.

    ``stride``: elements between rows of ``x``. ``q``: int8 ``[M / tile][K / 64][tile][64]``. ``row``: float32 ``(M,)``,
    the scale. ``start``: int32 ``(M, groups)``, what the sum of a group starts from, as codes are levels plus 1: minus
    the sum of the activations.
    """
    v32, vf, per_byte, span = VECTOR(I32, 16), VECTOR(F32, 16), 8 // bits, 32 // bits

    def load(source: ir.Value, index: ir.Value) -> ir.Value:
        if wide:
            return b.read(source, F32, index, 16)
        return b.bitcast(b.shl(b.zext(b.read(source, I16, index, 16), v32), const(16, I32, 16)), vf)

    with b.loop(rows) as offset:
        m = b.plus(first, offset)
        source = b.at(x, F32 if wide else I16, b.times(m, stride))
        # The bits of floats without their sign are in the order of the floats, and NaN is above infinity.
        most = b.variable(const(16, I32, 0))
        with b.loop(b.times(groups, GROUP // 16)) as i:
            magnitude = b.and_(b.bitcast(load(source, b.times(i, 16)), v32), const(16, I32, 0x7FFFFFFF))
            b.store(b.intrinsic("llvm.smax.v16i32", v32, b.get(most), magnitude), most)
        amax = b.bitcast(b.intrinsic("llvm.vector.reduce.smax.v16i32", I32, b.get(most)), F32)
        inverse = b.select(b.fcmp_ordered(">", amax, F32(0.0)), b.fdiv(F32(127.0), amax), F32(0.0))
        b.write(b.fdiv(amax, F32(127.0)), row, F32, m)
        within = b.plus(b.times(b.udiv(m, I64(tile)), groups, GROUP * tile), b.times(b.urem(m, I64(tile)), 64))
        target = b.at(q, I8, within)
        with b.loop(groups) as g:
            total = const(16, I32, 0)
            for half in (0, 1):
                values = []
                for i in range(4):
                    v = load(source, b.plus(b.times(g, GROUP), 64 * half + 16 * i))
                    v = b.intrinsic("llvm.rint.v16f32", vf, b.fmul(v, b.splat(inverse, 16)))
                    values.append(b.fptosi(v, v32))
                    total = b.add(total, values[-1])
                for i in range(4):
                    # Position p of the codes of a word: byte p % 4 at shift p // 4.
                    places = [divmod(16 * i + lane, span) for lane in range(16)]
                    order = [word * span + p % 4 * per_byte + p // 4 for word, p in places]
                    low = min(order) // 16
                    v = b.shuffle(values[low], values[min(low + 1, 3)], [k - 16 * low for k in order])
                    at = b.plus(b.times(g, 128 * tile), 64 * tile * half + 16 * i)
                    b.write(b.trunc(v, VECTOR(I8, 16)), target, I8, at)
            total = b.neg(b.intrinsic("llvm.vector.reduce.add.v16i32", I32, total))
            b.write(total, start, I32, b.plus(b.times(m, groups), g))
