"""HQQ text encoders: a pickle (``qmodel.pt``) of ``{module path: dict}``.

An unquantised module holds ``weight`` (FP16). A quantised linear holds ``W_q`` uint8 in HQQ's 4bit_u8 packing,
``scale`` and ``zero`` FP16 ``(N * K / group, 1)``, and ``nbits``, ``group_size``, ``shape``, ``axis``, ``packing``;
older files nest all but ``W_q`` under ``meta``. ``W = (code - zero) * scale``.

4bit_u8 is ``(G / 2, group)`` for G groups of ``group`` weights (row-major over the weight): the high nibbles hold the
first G / 2 groups, the low nibbles the rest.

Source: hqq 0.2.8 ``save_quantized`` (``tests/test_formats.py`` loads what it writes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.packed import packed_weight
from ..check import FLOATS
from ..errors import CHOOSE_TEXT_ENCODER, CHOOSE_UNMODIFIED, DOWNLOAD_AGAIN, ModelFileError
from ..files import TensorFile, check_stored
from .interface import Format, Tensors

_EXPECTED = {"nbits": 4, "packing": "4bit_u8", "axis": 1}
_TABLES = ("W_q", "scale", "zero")
_FLAGS = ("quant_zero", "quant_scale", "view_as_float")


def matches(file: TensorFile) -> bool:
    """Dicts that hold ``W_q``."""
    return any(isinstance(value, dict) and "W_q" in value for value in file.tensors.values())


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors, without the language-model head, which shares the embedding. Raises ModelFileError."""
    stored = file.take_pickle()
    result = {}
    for module in file.each(stored):
        entry = stored.pop(module)
        if module == "lm_head":
            continue
        if not isinstance(entry, dict):
            raise ModelFileError(file.path, f"{module} to be a dict", f"a {type(entry).__name__}", DOWNLOAD_AGAIN)
        flat = entry | entry["meta"] if isinstance(entry.get("meta"), dict) else entry
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                check_stored(file.path, f"{module}.{key}", value)
                if key not in (_TABLES if "W_q" in flat else ("weight",)):
                    raise ModelFileError(file.path, "only the tensors of the model", f"{key} in {module}",
                                         CHOOSE_UNMODIFIED)
        if "W_q" in flat:
            result[f"{module}.weight"] = _weight(file.path, module, flat)
        elif isinstance(flat.get("weight"), torch.Tensor):
            result[f"{module}.weight"] = flat["weight"]
        else:
            raise ModelFileError(file.path, f"W_q or weight in {module}", "neither", DOWNLOAD_AGAIN)
    return result


def _weight(path: Path, module: str, entry: dict[str, Any]) -> QuantizedTensor:
    """The canonical weight of one quantised entry, which is what was unpickled: of any types. Raises ModelFileError."""
    for key, value in _EXPECTED.items():
        # Exact types first: what is not a number or a name cannot be compared, or shown.
        if type(entry.get(key)) is not type(value) or entry[key] != value:
            raise ModelFileError(path, f"{module} as 4-bit 4bit_u8 along axis 1", f"another {key}", CHOOSE_TEXT_ENCODER)
    if any(entry.get(flag) not in (None, False) for flag in _FLAGS):
        raise ModelFileError(path, f"{module} with plain scales and zeros", "quantised ones", CHOOSE_TEXT_ENCODER)
    tables = [part for name in _TABLES if isinstance(part := entry.get(name), torch.Tensor)]
    if len(tables) < len(_TABLES):
        raise ModelFileError(path, f"W_q, scale and zero in {module}", "not all of them", DOWNLOAD_AGAIN)
    shape, group = entry.get("shape"), entry.get("group_size")
    sizes = (*shape, group) if isinstance(shape, (tuple, list)) and len(shape) == 2 else ()
    if not sizes or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ModelFileError(path, f"shape and group_size of {module} as positive integers", "something else",
                             DOWNLOAD_AGAIN)
    return _packed(path, module, *sizes, *tables)


def _packed(path: Path, module: str, n: int, k: int, group: int, w_q: torch.Tensor, scale: torch.Tensor,
            zero: torch.Tensor) -> QuantizedTensor:
    groups = n * k // group
    if (k % group or group % 2 or groups % 2 or w_q.dtype != torch.uint8 or tuple(w_q.shape) != (groups // 2, group)
            or tuple(scale.shape) != (groups, 1) or scale.shape != zero.shape):
        raise ModelFileError(path, f"{module} of {n} x {k} in groups of {group}",
                             f"W_q {tuple(w_q.shape)}, scale {tuple(scale.shape)} and zero {tuple(zero.shape)}",
                             DOWNLOAD_AGAIN)
    if scale.dtype not in FLOATS or scale.dtype != zero.dtype:
        raise ModelFileError(path, f"scale and zero of {module} in one of BF16, FP16 and FP32",
                             f"{scale.dtype} and {zero.dtype}", DOWNLOAD_AGAIN)
    scale, zero = (part.reshape(n, k // group) for part in (scale, zero))
    return packed_weight(from_4bit_u8(w_q, n, k), scale, 4, "zeropoint", zero, dtype=scale.dtype)


def from_4bit_u8(w_q: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """HQQ 4bit_u8 ``(G / 2, group)`` -> canonical 4-bit codes ``(n, k / 2)``."""
    halves = [nibble[:, 0::2] | (nibble[:, 1::2] << 4) for nibble in (w_q >> 4, w_q & 15)]
    return torch.cat(halves).view(n, k // 2)


FORMAT = Format("hqq", matches, decode, only_tensors=False)
