"""HQQ text encoders: a pickle (``qmodel.pt``) of ``{module path: dict}``.

An unquantised module holds ``weight`` (FP16). A quantised linear holds ``W_q`` uint8 in HQQ's 4bit_u8 packing (see
``ops/codecs.py``), ``scale`` and ``zero`` FP16 ``(N * K / group, 1)``, and ``nbits``, ``group_size``, ``shape``,
``axis``, ``packing``; older files nest all but ``W_q`` under ``meta``. ``W = (code - zero) * scale``.

Source: hqq 0.2.8 ``save_quantized`` (``tests/test_formats.py`` loads what it writes).
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..ops import codecs
from ..ops.packed import packed_weight
from .errors import DOWNLOAD_AGAIN, PackError
from .files import TensorFile, read_pickle

NAME = "hqq"
_FLAGS = ("quant_zero", "quant_scale", "view_as_float")


def matches(file: TensorFile) -> bool:
    return any(isinstance(value, dict) and "W_q" in value for value in file.tensors.values())


def decode(file: TensorFile) -> dict[str, torch.Tensor]:
    # As with GemLite packs, the bytes are rearranged: read them, and drop each module once it is converted.
    stored = read_pickle(file.path, mmap=False)
    file.tensors.clear()
    result = {}
    for module in list(stored):
        entry = stored.pop(module)
        if module == "lm_head":
            continue
        if not isinstance(entry, dict):
            raise PackError(file.path, f"{module} to be a dict", f"a {type(entry).__name__}", DOWNLOAD_AGAIN)
        flat = entry | entry["meta"] if isinstance(entry.get("meta"), dict) else entry
        if "W_q" in flat:
            result[f"{module}.weight"] = _weight(file, module, flat)
        elif isinstance(flat.get("weight"), torch.Tensor):
            result[f"{module}.weight"] = flat["weight"]
        else:
            raise PackError(file.path, f"W_q or weight in {module}", ", ".join(map(str, flat))[:80], DOWNLOAD_AGAIN)
    return result


def _weight(file: TensorFile, module: str, entry: dict) -> QuantizedTensor:
    shape, group = entry.get("shape"), entry.get("group_size")
    stated = (entry.get("nbits"), entry.get("packing"), entry.get("axis"))
    if stated != (4, "4bit_u8", 1) or any(entry.get(flag) for flag in _FLAGS):
        raise PackError(file.path, f"{module} as 4-bit 4bit_u8 along axis 1", f"{stated}",
                        "choose a Bonsai text encoder")
    w_q, scale, zero = (entry.get(name) for name in ("W_q", "scale", "zero"))
    tensors = all(isinstance(part, torch.Tensor) for part in (w_q, scale, zero))
    if not tensors or not isinstance(group, int) or group < 2:
        raise PackError(file.path, f"W_q, scale and zero in groups in {module}", "not all of them", DOWNLOAD_AGAIN)
    n, k = tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 2 else (0, 0)
    groups = n * k // group
    if (not groups or k % group or w_q.dtype != torch.uint8 or tuple(w_q.shape) != (groups // 2, group)
            or scale.numel() != groups or zero.numel() != groups):
        raise PackError(file.path, f"{module} of shape {shape} in groups of {group}",
                        f"W_q {tuple(w_q.shape)}, {scale.numel()} scales and {zero.numel()} zeros", DOWNLOAD_AGAIN)
    scale, zero = (part.reshape(n, k // group) for part in (scale, zero))
    return packed_weight(codecs.from_hqq(w_q, n, k), scale, 4, "zeropoint", zero, dtype=scale.dtype)
