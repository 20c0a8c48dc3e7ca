"""HQQ text encoders: a pickle (``qmodel.pt``) of ``{module path: dict}``.

An unquantized module holds ``weight`` (FP16). A quantized linear holds ``W_q`` uint8 in HQQ's 4bit_u8 packing,
``scale`` and ``zero`` FP16 ``(N * K / group, 1)``, and ``nbits``, ``group_size``, ``shape``, ``axis``, ``packing``;
older files nest all but ``W_q`` under ``meta``. ``W = (code - zero) * scale``.

4bit_u8 is ``(G / 2, group)`` for G groups of ``group`` weights (row-major over the weight): the high nibbles hold the
first G / 2 groups, the low nibbles the rest.

Source: hqq 0.2.8 ``save_quantized`` (``tests/test_formats.py`` loads what it writes).
"""

import reprlib
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.packed import packed_weight
from ..check import check_scales
from ..files import TensorFile, check_stored
from .interface import Format, Tensors, decode_layers

#: The entries, other than tensors and sizes, that are read.
_EXPECTED = {"nbits": 4, "packing": "4bit_u8", "axis": 1, "quant_zero": False, "quant_scale": False,
             "view_as_float": False}


def matches(file: TensorFile) -> bool:
    """Dicts that hold ``W_q``."""
    return any(isinstance(value, dict) and "W_q" in value for value in file.tensors.values())


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors, without the language-model head, which shares the embedding."""
    stored = file.take_pickle()
    stored.pop("lm_head", None)
    return decode_layers(file, stored, list(stored), (), lambda module: _weight(
        file.path, module, stored.pop(module)))


def _weight(path: Path, module: str, entry: Any) -> torch.Tensor:
    """The weight of one entry, which is what was unpickled: of any types."""
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__} instead of a dict")
    entry = entry | entry["meta"] if isinstance(entry.get("meta"), dict) else entry
    tensors = {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)}
    for key, tensor in tensors.items():
        check_stored(path, f"{module}.{key}", tensor)
    if tensors.keys() == {"weight"} and "W_q" not in entry:
        return tensors["weight"]
    if tensors.keys() != {"W_q", "scale", "zero"}:
        raise ValueError(f"the tensors {reprlib.repr(list(tensors))} instead of W_q, scale and zero, or weight")
    for key, value in _EXPECTED.items():
        # Exact types first: what is not a number or a name cannot be compared, or shown.
        stated = entry.get(key) or False
        if type(stated) is not type(value) or stated != value:
            raise ValueError(f"another {key} than {value}")
    shape, group = entry.get("shape"), entry.get("group_size")
    sizes = (*shape, group) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ValueError("shape and group_size that are not three positive integers")
    return _packed(*sizes, tensors["W_q"], tensors["scale"], tensors["zero"])


def _packed(n: int, k: int, group: int, w_q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> QuantizedTensor:
    check_scales(scale, zero)
    groups = n * k // group
    if (k % group or group % 2 or groups % 2 or w_q.dtype != torch.uint8 or w_q.shape != (groups // 2, group)
            or scale.shape != (groups, 1)):
        raise ValueError(f"W_q {tuple(w_q.shape)} and scale {tuple(scale.shape)} for {n} x {k} in groups of {group}")
    scale, zero = (part.reshape(n, k // group) for part in (scale, zero))
    return packed_weight(from_4bit_u8(w_q, n, k), scale, 4, "zeropoint", zero, dtype=scale.dtype)


def from_4bit_u8(w_q: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """HQQ 4bit_u8 ``(G / 2, group)`` -> canonical 4-bit codes ``(n, k / 2)``."""
    halves = [nibble[:, 0::2] | (nibble[:, 1::2] << 4) for nibble in (w_q >> 4, w_q & 15)]
    return torch.cat(halves).view(n, k // 2)


FORMAT = Format("hqq", matches, decode, only_tensors=False)
