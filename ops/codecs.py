"""Lossless codecs between the canonical codes (see ``ops/packed.py``) and the published storage formats.

Every function is pure, vectorised, and keeps all the information of its input or raises ValueError.

MLX words
    uint32 ``(N, K * bits / 32)``; element k is in word ``k // (32 / bits)``, ``bits * (k % (32 / bits))`` up. Read as
    little-endian bytes, the words are the canonical codes.
GemLite ``W_q``
    Packed along K, LSB first, stored transposed: uint8 ``(K * bits / 8, N)`` with packing width 8, int32
    ``(K * bits / 32, N)`` with packing width 32.
HQQ 4bit_u8
    uint8 ``(G / 2, group)`` for G groups of ``group`` weights (row-major over the weight). The high nibbles hold the
    first G / 2 groups, the low nibbles the rest.
Dense
    Floating ``(N, K)``, accepted only if every group of ``group`` values along K is ``{-s, 0, s}`` (2 bits) or
    ``{-s, s}`` (1 bit).
Base 3
    uint8 ``(N, ceil(K / 5))``: five 2-bit codes 0, 1, 2 of a row in one byte, ``sum(code[i] * 3**i)``. A row whose K
    is no multiple of 5 ends in zero digits. 1.6 bits a weight.
"""

from __future__ import annotations

import sys

import torch

if sys.byteorder != "little":
    raise ImportError("Bonsai packs are little-endian; this machine is not")

BASE3_DIGITS = 5

#: Rows converted at a time where the intermediate form is larger than the codes, so that it stays in cache.
_BLOCK_ROWS = 512


def unpack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Canonical codes ``(N, K * bits / 8)`` -> one code an element, uint8 ``(N, K)``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes[..., None] >> shifts) & (2**bits - 1)).view(codes.shape[0], -1)


def pack_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """One code an element, uint8 ``(N, K)`` -> canonical codes. K must fill whole bytes; codes must fit ``bits``."""
    per_byte = 8 // bits
    if values.shape[1] % per_byte:
        raise ValueError(f"{values.shape[1]} codes of {bits} bits do not fill whole bytes")
    if values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"code {int(values.max())} does not fit {bits} bits")
    columns = values.view(values.shape[0], -1, per_byte)
    packed = columns[..., 0].clone()
    for i in range(1, per_byte):
        packed |= columns[..., i] << (bits * i)
    return packed


def from_mlx(words: torch.Tensor) -> torch.Tensor:
    """MLX uint32 words ``(N, W)`` -> canonical codes ``(N, 4 * W)``, a view."""
    return words.contiguous().view(torch.uint8)


def to_mlx(codes: torch.Tensor) -> torch.Tensor:
    """Canonical codes -> MLX uint32 words, a view where alignment allows."""
    if codes.shape[1] % 4:
        raise ValueError(f"rows of {codes.shape[1]} bytes do not fill 32-bit words")
    codes = codes.contiguous()
    if codes.storage_offset() % 4 or codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.uint32)


def from_gemlite(w_q: torch.Tensor) -> torch.Tensor:
    """GemLite ``W_q`` of packing width 8 (uint8) or 32 (int32), stored ``(packed K, N)`` -> canonical codes."""
    if w_q.dtype not in (torch.uint8, torch.int32):
        raise ValueError(f"GemLite W_q is uint8 or int32, got {w_q.dtype}")
    return w_q.t().contiguous().view(torch.uint8)


def to_gemlite(codes: torch.Tensor, packing_width: int = 8) -> torch.Tensor:
    """Canonical codes -> GemLite ``W_q`` for a packing width of 8 or 32 bits."""
    words = codes if packing_width == 8 else to_mlx(codes).view(torch.int32)
    return words.t().contiguous()


def from_hqq(w_q: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """HQQ 4bit_u8 ``(G / 2, group)`` -> canonical 4-bit codes ``(n, k / 2)``."""
    halves = [nibble[:, 0::2] | (nibble[:, 1::2] << 4) for nibble in (w_q >> 4, w_q & 15)]
    return torch.cat(halves).view(n, k // 2)


def to_hqq(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Canonical 4-bit codes -> HQQ 4bit_u8. The number of groups must be even."""
    groups = unpack_codes(codes, 4).view(-1, group)
    if groups.shape[0] % 2:
        raise ValueError(f"4bit_u8 stores pairs of groups, got {groups.shape[0]} groups")
    first, second = groups.chunk(2)
    return (first << 4) | second


def from_dense(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weight ``(N, K)`` -> canonical codes and scale ``(N, K / group)`` in the weight's dtype.

    Raises ValueError, naming the first offending group, unless every group holds only ``{-s, 0, s}`` (2 bits) or
    ``{-s, s}`` (1 bit). A ternary group of zeros has scale 0 and code 1 throughout.
    """
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no whole groups of {group} along K")
    groups = weight.reshape(weight.shape[0], -1, group)
    scale = groups.abs().amax(-1)
    fits = (groups.abs() == scale[..., None])
    if bits == 2:
        fits |= groups == 0
    if not bool(fits.all()):
        row, index = (int(i) for i in (~fits.all(-1)).nonzero()[0])
        values = groups[row, index].unique().tolist()
        shown = ", ".join(f"{value:.6g}" for value in values[:5]) + (", ..." if len(values) > 5 else "")
        alphabet = "{-s, s}" if bits == 1 else "{-s, 0, s}"
        raise ValueError(f"row {row}, group {index} holds {shown}, not {alphabet}")
    codes = groups.gt(0).to(torch.uint8) if bits == 1 else (groups.sign() + 1).to(torch.uint8)
    return pack_codes(codes.view(weight.shape), bits), scale


def to_base3(codes: torch.Tensor) -> torch.Tensor:
    """Canonical 2-bit codes ``(N, K / 4)`` of a ternary weight -> base-3 bytes. Raises ValueError on a code 3."""
    rows = []
    for block in codes.split(_BLOCK_ROWS):
        digits = unpack_codes(block, 2)
        if digits.numel() and int(digits.max()) > 2:
            raise ValueError("code 3 is not ternary")
        digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % BASE3_DIGITS))
        digits = digits.view(len(block), -1, BASE3_DIGITS)
        packed = digits[..., BASE3_DIGITS - 1].clone()
        for i in reversed(range(BASE3_DIGITS - 1)):
            packed = packed * 3 + digits[..., i]
        rows.append(packed)
    return torch.cat(rows)


def from_base3(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Base-3 bytes ``(N, ceil(k / 5))`` -> canonical 2-bit codes ``(N, k / 4)``.

    Raises ValueError on a byte above 242, on padding digits that are not zero, and on a wrong width.
    """
    n, width = packed.shape
    if width != -(-k // BASE3_DIGITS) or k % 4:
        raise ValueError(f"{width} base-3 bytes a row do not hold {k} codes")
    if packed.numel() and int(packed.max()) >= 3**BASE3_DIGITS:
        raise ValueError(f"byte {int(packed.max())} is not base 3 (0 to {3**BASE3_DIGITS - 1})")
    used = k - (width - 1) * BASE3_DIGITS
    if packed.numel() and int(packed[:, -1].max()) >= 3**used:
        raise ValueError("padding digits are not zero")
    # One byte gives five 2-bit codes, 10 bits. Two are looked up at once, as a 16-bit word; two words are 40 bits, five
    # canonical bytes, read off an int64.
    values = torch.arange(3**BASE3_DIGITS)
    ten_bits = torch.zeros(256, dtype=torch.int32)
    ten_bits[: len(values)] = sum(((values // 3**i) % 3) << (2 * i) for i in range(BASE3_DIGITS)).int()
    table = (ten_bits[None, :] | (ten_bits[:, None] << 10)).view(-1, 1).to(packed.device)
    codes = packed.new_empty(n, k // 4)
    for start in range(0, n, _BLOCK_ROWS):
        rows = torch.nn.functional.pad(packed[start : start + _BLOCK_ROWS], (0, -width % 4))
        words = torch.nn.functional.embedding(rows.view(torch.uint16).int(), table).view(len(rows), -1, 2).long()
        quads = words[..., 0] | (words[..., 1] << 20)
        codes[start : start + len(rows)] = (
            quads.view(torch.uint8).view(len(rows), -1, 8)[..., :5].reshape(len(rows), -1)[:, : k // 4])
    return codes


def narrow_scales(*tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Float tables in the smallest common dtype of BF16, FP16 and FP32 that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        narrowed = tuple(table.to(dtype) for table in tables)
        if all(torch.equal(small.to(table.dtype), table) for small, table in zip(narrowed, tables, strict=True)):
            return narrowed
    return tables
