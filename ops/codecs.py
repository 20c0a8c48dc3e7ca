"""One code an element, or as many as fit a byte: canonical codes (see ``ops/packed.py``) unpacked and packed."""

from __future__ import annotations

import torch


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
