"""A few columns of an int8 product: int32 inside a group of 128, float32 across groups (``backends/interface.py``).

The codes of the columns become a panel of bytes, which stays in the L2 cache while it is multiplied with all rows of
activations. All instructions share this text but for :func:`dot` and, for AMX, :func:`add_tiles`.
"""

from llvmlite import ir

from ...packed import LEVELS
from .kernels import GROUP, KINDS, Address, Integer, Kind
from .llvm import F32, I8, I16, I32, I64, VECTOR, Builder, const


def multiply(b: Builder, q: Address, row: Address, start: Address, codes: Address, stride: Integer, scale: Address,
             columns: Integer, panel: Address, acc: Address, out: Address, rows: Integer, groups: Integer, *, name: str,
             bits: int, wide: bool) -> None:
    """``out[m, n]`` for all ``rows`` m and as many n as a block has: BF16, or float32 if ``wide``.

    ``q``, ``row``, ``start``: from ``quantise``. ``scale``: float32 ``(groups, columns)``, ``columns`` being N of the
    whole weight and of ``out``. ``panel``: room for the weight as bytes. ``acc``: room for the sums of one block.
    """
    kind, tiles = KINDS[name], name == "amx"
    if tiles:
        configure_tiles(b)
    decode(b, kind, codes, stride, panel, groups, bits=bits, signed=tiles)
    with b.loop(rows, kind.rows) as m:
        with b.loop(kind.rows * kind.columns, kind.lanes) as i:
            b.write(const(kind.lanes, F32, 0.0), acc, F32, i)
        block = b.at(q, I8, b.times(m, groups, GROUP)), b.at(start, I32, b.times(m, groups))
        (add_tiles if tiles else add_vectors)(b, name, *block, scale, columns, panel, acc, groups)
        with b.loop(kind.rows) as r, b.if_then(b.icmp_signed("<", b.plus(m, r), rows)):
            factor = b.splat(b.read(row, F32, b.plus(m, r)), kind.lanes)
            for v in range(0, kind.columns, kind.lanes):
                value = b.fmul(b.read(acc, F32, b.plus(b.times(r, kind.columns), v), kind.lanes), factor)
                value = value if wide else b.bfloat16(value)
                b.write(value, out, F32 if wide else I16, b.plus(b.times(b.plus(m, r), columns), v))
    if tiles:
        b.intrinsic("llvm.x86.tilerelease", ir.VoidType())


def decode(b: Builder, kind: Kind, codes: ir.Value, stride: ir.Value, panel: ir.Value, groups: ir.Value, *, bits: int,
           signed: bool) -> None:
    """The rows of the weight that are a block's columns -> ``panel`` of bytes ``[K / 4][columns][4]``: levels if
    ``signed``, else levels plus 1."""
    lanes, per_byte = kind.lanes, 8 // bits
    with b.loop(b.times(groups, GROUP // 4 // per_byte)) as word:
        for first in range(0, kind.columns, lanes):
            v = ir.Constant(VECTOR(I32, lanes), ir.Undefined)
            for lane in range(lanes):
                at = b.at(codes, I8, b.plus(b.times(stride, first + lane), b.times(word, 4)))
                v = b.insert_element(v, b.read(at, I32, 0), I32(lane))
            for j in range(per_byte):
                c = b.lshr(v, const(lanes, I32, bits * j))
                c = b.mul(b.and_(c, const(lanes, I32, (2**bits - 1) * 0x01010101)), const(lanes, I32, LEVELS[bits][0]))
                if signed:
                    c = b.sub(b.bitcast(c, VECTOR(I8, 4 * lanes)), const(4 * lanes, I8, 1))
                b.write(c, panel, I32, b.plus(b.times(word, per_byte * kind.columns), j * kind.columns + first))


def accumulate(b: Builder, sums: ir.Value, factor: ir.Value, acc: ir.Value, index: int) -> None:
    """``acc[index:] += sums * factor`` in float32, for a vector of the int32 sums of a group."""
    vf = factor.type
    old = b.read(acc, F32, index, vf.count)
    b.write(b.intrinsic(f"llvm.fma.v{vf.count}f32", vf, b.sitofp(sums, vf), factor, old), acc, F32, index)


def dot(b: Builder, name: str, sums: ir.Value, weight: ir.Value, activation: ir.Value) -> ir.Value:
    """``sums`` plus the products of the bytes of ``weight`` and ``activation``, both ``<lanes x i32>``."""
    lanes = KINDS[name].lanes
    u, s = (b.bitcast(v, VECTOR(I8, 4 * lanes)) for v in (weight, activation))
    if name == "avx2":
        # 64 products of at most 3 * 127 meet in one 16-bit sum of a group: they fit.
        return b.add(sums, b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", sums.type, u, s))
    return b.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums.type, sums, u, s)


def add_vectors(b: Builder, name: str, q: ir.Value, start: ir.Value, scale: ir.Value, columns: ir.Value,
                panel: ir.Value, acc: ir.Value, groups: ir.Value) -> None:
    """The product of a block of rows with the panel, added to ``acc``, by dots of vectors."""
    kind, lanes, unroll = KINDS[name], KINDS[name].lanes, 2
    block = [(r, v) for r in range(kind.rows) for v in range(kind.vectors)]
    pairs = ir.Constant(VECTOR(I16, 2 * lanes), None)  # zeros
    with b.loop(groups) as g:
        starts = [b.splat(b.read(start, I32, b.plus(b.times(groups, r), g)), lanes) for r in range(kind.rows)]
        sums = {(r, v): b.variable(pairs if name == "avx2" else starts[r]) for r, v in block}
        with b.loop(GROUP // 4, unroll) as k4:
            for at in (b.plus(b.times(g, GROUP // 4), k4, i) for i in range(unroll)):
                weights = [b.read(panel, I32, b.plus(b.times(at, kind.columns), v * lanes), lanes)
                           for v in range(kind.vectors)]
                first = b.plus(b.times(b.lshr(at, I64(4)), 16 * kind.rows), b.and_(at, I64(15)))
                for r in range(kind.rows):
                    activation = b.splat(b.read(q, I32, b.plus(first, 16 * r)), lanes)
                    for v, weight in enumerate(weights):
                        b.store(dot(b, name, b.get(sums[r, v]), weight, activation), sums[r, v])
        scales = [b.read(scale, F32, b.plus(b.times(g, columns), v * lanes), lanes) for v in range(kind.vectors)]
        for r, v in block:
            total = b.get(sums[r, v])
            if name == "avx2":
                ones = const(2 * lanes, I16, 1)
                total = b.add(b.intrinsic("llvm.x86.avx2.pmadd.wd", VECTOR(I32, lanes), total, ones), starts[r])
            accumulate(b, total, scales[v], acc, (r * kind.vectors + v) * lanes)


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


def add_tiles(b: Builder, name: str, q: ir.Value, start: ir.Value, scale: ir.Value, columns: ir.Value,
              panel: ir.Value, acc: ir.Value, groups: ir.Value) -> None:
    """As :func:`add_vectors` by AMX, a square of 32 x 32 sums at a time: tiles 0 to 3 hold them, 4 and 5 activations, 6
    and 7 levels.

    All squares of a group follow each other: its activations and levels come from the L2 cache once. The sums of one
    square are added to ``acc`` while the next one is multiplied.
    """
    kind = KINDS[name]
    corners = [(m, n) for m in range(0, kind.rows, 32) for n in range(0, kind.columns, 32)]  # an even number
    stored = b.at(acc, F32, kind.rows * kind.columns)  # behind the sums, twice four tiles

    def add(g: ir.Value, square: int) -> None:
        m, n = corners[square]
        scales = [b.read(scale, F32, b.plus(b.times(g, columns), n + v), 16) for v in (0, 16)]
        for tile in range(4):
            for r in range(16):
                sums = b.read(stored, I32, 1024 * (square % 2) + 256 * tile + 16 * r, 16)
                accumulate(b, sums, scales[tile % 2], acc,
                           (m + tile // 2 * 16 + r) * kind.columns + n + tile % 2 * 16)

    with b.loop(groups) as g:
        for square, (m, n) in enumerate(corners):
            for tile in range(4):
                amx(b, "tilezero", tile)
            for half in range(2):
                for i in range(2):
                    left = b.plus(b.times(groups, GROUP * (m + 16 * i)), b.times(g, 2048), 1024 * half)
                    amx(b, "tileloadd64", 4 + i, b.at(q, I8, left), I64(64))
                    right = b.plus(b.times(g, GROUP * kind.columns), 64 * kind.columns * half + 4 * (n + 16 * i))
                    amx(b, "tileloadd64", 6 + i, b.at(panel, I8, right), I64(4 * kind.columns))
                for tile in range(4):
                    amx(b, "tdpbssd", tile, 4 + tile // 2, 6 + tile % 2)
            if square:
                add(g, square - 1)
            else:
                with b.if_then(b.icmp_signed(">", g, I64(0))):
                    add(b.sub(g, I64(1)), len(corners) - 1)
            for tile in range(4):
                amx(b, "tilestored64", tile, b.at(stored, I32, 1024 * (square % 2) + 256 * tile), I64(64))
    add(b.sub(groups, I64(1)), len(corners) - 1)
