"""A few columns of a product with int8 digits: int32 inside a group, float32 across groups (``backends/interface.py``).

The codes of a block of columns become a panel of bytes, which stays in the L2 cache while it is multiplied with all
rows of activations::

    activations (kernels.quantize)              panel (decode)
    row r of the tile: 64 bytes along K         4 bytes along K of each column
      k 0 1 2 3 | 4 5 6 7 | ... 63                column 0     1     ...
    0   a a a a | . . . .                       k 0-3  c c c c c c c c
    1   . . . . | . . . .                       k 4-7  . . . .
    :                                           :
    one tile of AMX: 16 rows                    one tile of AMX: 16 of these rows, 16 columns

One instruction multiplies four activations of one row with the four codes below each other in as many columns as a
vector has lanes, and adds them to a 32-bit sum of each column; AMX does so for 16 rows. The high digits of a group go
first, the sums are shifted by 7 bits, the low digits are added: the sum of a group is one integer, and one conversion
to float serves both.

All instructions share this text but for :func:`dot` and, for AMX, :func:`add_tiles`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from llvmlite import ir

from ...packed import LEVELS
from ..interface import Digits
from .kernels import KINDS, Address, Integer, Kind
from .llvm import F32, I8, I16, I32, I64, VECTOR, Builder, const


class Group(NamedTuple):
    """One block of rows, one of columns and one group: the addresses of what is multiplied, and of the sums ``acc``.

    ``size``: elements of the group. ``q``: its high and its low digits. ``shift`` is None for symmetric weights,
    ``second`` the condition under which there are low digits: None if never, True if always.
    """

    size: int
    q: list[ir.Value]
    step: ir.Value
    total: ir.Value
    panel: ir.Value
    scale: ir.Value
    shift: ir.Value | None
    acc: ir.Value
    second: ir.Value | bool | None


def multiply(b: Builder, worker: Integer, piece: Integer, q: Address, plane: Integer, step: Address, total: Address,
             second: Address, codes: Address, stride: Integer, scale: Address, shift: Address, columns: Integer,
             rooms: Address, room: Integer, out: Address, rows: Integer, groups: Integer, *, name: str, bits: int,
             form: str, group: int, wide: bool, digits: Digits) -> None:
    """``out[m, n]`` for all ``rows`` m and as many n as a block has: BF16, or float32 if ``wide``. A block is a piece.

    ``q``, ``plane``, ``step``, ``total``, ``second``: of ``quantize``. ``codes``: ``stride`` bytes between rows.
    ``scale``, ``shift``: float32 ``(groups, columns)``, ``columns`` being N of the whole weight and of ``out``.
    ``rooms``: ``room`` bytes for each worker, for the sums of some blocks, the tiles of AMX and the panel.
    """
    kind, tiles = KINDS[name], name == "amx"
    # The last block overlaps the one before it, which computes the same values.
    first = b.least(b.times(piece, kind.columns), b.sub(columns, I64(kind.columns)))
    acc = b.at(rooms, I8, b.times(worker, room))
    panel = b.at(acc, I8, kind.sums)
    if tiles:
        configure_tiles(b)
    decode(b, kind, b.at(codes, I8, b.times(first, stride)), stride, panel, b.times(groups, group * bits // 32),
           bits=bits, step=LEVELS[bits][0] if form == "symmetric" else 1)
    with b.loop(rows, kind.rows * kind.blocks) as m:
        count = b.least(b.sub(rows, m), I64(kind.rows * kind.blocks))
        with b.loop(kind.rows * kind.blocks * kind.columns, kind.lanes) as i:
            b.write(const(kind.lanes, F32, 0.0), acc, F32, i)
        with b.loop(groups) as g, b.loop(count, kind.rows) as r:
            block = b.plus(m, r)
            tile = b.plus(b.times(b.udiv(block, I64(kind.tile)), groups), g)
            at = b.plus(b.times(g, columns), first)
            flag = b.read(second, I32, b.plus(b.times(b.udiv(block, I64(kind.rows)), groups), g))
            part = Group(
                group, [b.at(q, I8, b.plus(at, b.times(tile, group * kind.tile))) for at in (0, plane)],
                b.at(step, F32, b.times(tile, kind.tile)), b.at(total, I32, b.times(tile, kind.tile)),
                b.at(panel, I8, b.times(g, group * kind.columns)), b.at(scale, F32, at),
                None if form == "symmetric" else b.at(shift, F32, at), b.at(acc, F32, b.times(r, kind.columns)),
                b.icmp_signed("!=", flag, I32(0)) if digits == "adaptive" else digits == 2 or None)
            (add_tiles if tiles else add_vectors)(b, kind, name, bits, part, groups)
        with b.loop(count) as r:
            target = b.plus(b.times(b.plus(m, r), columns), first)
            for v in range(0, kind.columns, kind.lanes):
                value = b.read(acc, F32, b.plus(b.times(r, kind.columns), v), kind.lanes)
                b.write(value if wide else b.bfloat16(value), out, F32 if wide else I16, b.plus(target, v))
    if tiles:
        b.intrinsic("llvm.x86.tilerelease", ir.VoidType())


def decode(b: Builder, kind: Kind, codes: ir.Value, stride: ir.Value, panel: ir.Value, words: ir.Value, *, bits: int,
           step: int) -> None:
    """The rows of the weight that are a block's columns, ``words`` of 32 bits each -> ``panel`` of bytes
    ``[K / 4][columns][4]``: the codes times ``step``."""
    lanes, per_byte = kind.lanes, 8 // bits
    with b.loop(words) as word:
        for first in range(0, kind.columns, lanes):
            v = ir.Constant(VECTOR(I32, lanes), ir.Undefined)
            for lane in range(lanes):
                at = b.at(codes, I8, b.plus(b.times(stride, first + lane), b.times(word, 4)))
                v = b.insert_element(v, b.read(at, I32, 0), I32(lane))
            for j in range(per_byte):
                c = b.lshr(v, const(lanes, I32, bits * j))
                c = b.mul(b.and_(c, const(lanes, I32, (2**bits - 1) * 0x01010101)), const(lanes, I32, step))
                b.write(c, panel, I32, b.plus(b.times(word, per_byte * kind.columns), j * kind.columns + first))


def accumulate(b: Builder, part: Group, sums: ir.Value, place: ir.Value | int, scale: ir.Value,
               shift: ir.Value | None, index: int) -> None:
    """Adds the sums of one row, a vector of columns, to ``acc[index:]`` in float32.

    ``place``: that of the row in ``part.step`` and ``part.total``.
    """
    vf = scale.type
    row = b.splat(b.read(part.step, F32, place), vf.count)
    old = b.read(part.acc, F32, index, vf.count)
    if shift is not None:
        old = b.intrinsic(f"llvm.fma.v{vf.count}f32", vf, b.splat(b.read(part.total, F32, place), vf.count), shift, old)
    value = b.intrinsic(f"llvm.fma.v{vf.count}f32", vf, b.sitofp(sums, vf), b.fmul(scale, row), old)
    b.write(value, part.acc, F32, index)


def shifted(b: Builder, part: Group, high: ir.Value, place: ir.Value | int) -> ir.Value:
    """The sums of the high digits in units of the low ones, with what a sum of codes starts from."""
    sums = b.shl(high, const(high.type.count, I32, 7))
    return sums if part.shift is not None else b.add(sums, b.splat(b.read(part.total, I32, place), high.type.count))


def second_digits(b: Builder, part: Group) -> AbstractContextManager:
    """Around the product of the second digits, where there may be some."""
    return nullcontext() if part.second is True else b.if_then(part.second)


def dot(b: Builder, name: str, sums: ir.Value, weight: ir.Value, activation: ir.Value) -> ir.Value:
    """``sums`` plus the products of the bytes of ``weight`` and ``activation``, both ``<lanes x i32>``."""
    lanes = KINDS[name].lanes
    u, s = (b.bitcast(v, VECTOR(I8, 4 * lanes)) for v in (weight, activation))
    if name == "avx2":
        return b.add(sums, b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", sums.type, u, s))
    return b.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums.type, sums, u, s)


def add_vectors(b: Builder, kind: Kind, name: str, bits: int, part: Group, groups: ir.Value) -> None:
    """Adds the product of ``part`` to its sums by dots of vectors."""
    lanes, unroll, rows = kind.lanes, 2, range(kind.rows)
    block = [(r, v) for r in rows for v in range(kind.vectors)]
    # avx2 adds products to sums of 16 bits, two in each lane of 32: 64 of at most 3 * 127 fit, and 16 of 15 * 127.
    narrow, span = name == "avx2", 32 if name == "avx2" and bits == 4 else part.size
    totals = {key: b.variable(const(lanes, I32, 0)) for key in block}

    def multiply_digit(digit: int) -> None:
        for chunk in range(0, part.size, span):
            sums = {key: b.variable(const(2 * lanes, I16, 0)) for key in block} if narrow else totals
            for first in range(chunk, chunk + span, min(span, 64)):
                with b.loop(min(span, 64) // 4, unroll) as k4:
                    for i in range(unroll):
                        at = b.plus(b.times(b.plus(k4, first // 4 + i), kind.columns))
                        weights = [b.read(part.panel, I32, b.plus(at, v * lanes), lanes) for v in range(kind.vectors)]
                        for r in rows:
                            at = b.plus(k4, (first // 64 * kind.tile + r) * 16 + first % 64 // 4 + i)
                            activation = b.splat(b.read(part.q[digit], I32, at), lanes)
                            for v, weight in enumerate(weights):
                                b.store(dot(b, name, b.get(sums[r, v]), weight, activation), sums[r, v])
            if narrow:
                ones = const(2 * lanes, I16, 1)
                for key, total in totals.items():
                    pairs = b.intrinsic("llvm.x86.avx2.pmadd.wd", VECTOR(I32, lanes), b.get(sums[key]), ones)
                    b.store(b.add(b.get(total), pairs), total)

    multiply_digit(0)
    for (r, _), total in totals.items():
        b.store(shifted(b, part, b.get(total), r), total)
    if part.second is not None:
        with second_digits(b, part):
            multiply_digit(1)
    for v in range(kind.vectors):
        scale, shift = (p and b.read(p, F32, v * lanes, lanes) for p in (part.scale, part.shift))
        for r in rows:
            accumulate(b, part, b.get(totals[r, v]), r, scale, shift, (r * kind.vectors + v) * lanes)


def amx(b: Builder, name: str, *args: ir.Value | int) -> None:
    """An instruction of AMX on tiles, which are numbered 0 to 7."""
    b.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *(I8(arg) if isinstance(arg, int) else arg for arg in args))


def configure_tiles(b: Builder) -> None:
    """Eight tiles of 16 rows of 64 bytes."""
    bytes64 = ir.ArrayType(I8, 64)
    table = ir.GlobalVariable(b.module, bytes64, "tiles")
    palette, row_bytes, rows = [1, *[0] * 15], [64, 0] * 8 + [0] * 16, [16] * 8 + [0] * 8
    table.initializer = ir.Constant(bytes64, bytearray(palette + row_bytes + rows))
    amx(b, "ldtilecfg", table)


def add_tiles(b: Builder, kind: Kind, name: str, bits: int, part: Group, groups: ir.Value) -> None:
    """As :func:`add_vectors` by AMX, a square of 32 x 32 sums at a time: tiles 0 to 3 hold them, 4 and 5 activations, 6
    and 7 codes. The sums of one square are added to ``part.acc`` while the next one is multiplied."""
    corners = [(m, n) for m in range(0, kind.rows, 32) for n in range(0, kind.columns, 32)]
    digits = 1 if part.second is None else 2
    # Behind the sums of a block: [square % 2][digit][tile][16][16].
    stored = b.at(part.acc, I32, kind.rows * kind.columns)
    tile_of_q = b.times(groups, part.size * kind.tile)

    def multiply_square(square: int, digit: int) -> None:
        m, n = corners[square]
        for half in range(part.size // 64):
            for i in range(2):
                left = b.plus(b.times(tile_of_q, m // 16 + i), 64 * half * kind.tile)
                amx(b, "tileloadd64", 4 + i, b.at(part.q[digit], I8, left), I64(64))
                right = 64 * kind.columns * half + 4 * (n + 16 * i)
                amx(b, "tileloadd64", 6 + i, b.at(part.panel, I8, right), I64(4 * kind.columns))
            for tile in range(4):
                amx(b, "tdpbsud", tile, 4 + tile // 2, 6 + tile % 2)

    def add_square(square: int) -> None:
        m, n = corners[square]
        for tile in range(4):
            v = n + tile % 2 * 16
            scale, shift = (p and b.read(p, F32, v, 16) for p in (part.scale, part.shift))
            for r in range(16):
                place = b.plus(b.times(groups, (m // 16 + tile // 2) * kind.tile), r)
                at = 2048 * (square % 2) + 256 * tile + 16 * r
                sums = shifted(b, part, b.read(stored, I32, at, 16), place)
                if digits == 2:
                    sums = b.add(sums, b.read(stored, I32, at + 1024, 16))
                accumulate(b, part, sums, place, scale, shift, (m + tile // 2 * 16 + r) * kind.columns + v)

    for square in range(len(corners) + 1):
        if square < len(corners):
            for digit in range(digits):
                for tile in range(4):
                    amx(b, "tilezero", tile)
                with second_digits(b, part) if digit else nullcontext():
                    multiply_square(square, digit)
                for tile in range(4):
                    target = b.at(stored, I32, 2048 * (square % 2) + 1024 * digit + 256 * tile)
                    amx(b, "tilestored64", tile, target, I64(64))
        if square:
            add_square(square - 1)
