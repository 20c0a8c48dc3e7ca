"""GemLite files: a pickle (``state_dict.pt``) of tensors, per packed layer

``W_q``        uint8 ``(K * bits / 8, N)`` or int32 ``(K * bits / 32, N)``: packed along K, stored transposed
``scales``     float32 ``(K / group, N)``; in published files every value is a BF16 number
``zeros``      like ``scales``, by ``W_group_mode``: 4 ``w = code * scale + zeros``; 3 ``w = (code - zeros) * scale``
``metadata``   int32[12], see ``ops/gemlite_backend.py``
``orig_shape`` (N, K)

and optionally ``bias`` and ``meta_scale``. Ternary weights have ``zeros == -scales``, binary ones ``-scales / 2``.

Source: GemLite 0.5 and 0.6, ``GemLiteLinearTriton.pack`` (``tests/test_formats.py`` loads what it writes and has it
load what is written here).
"""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.gemlite_backend import DTYPES, METADATA, MODES, metadata_fields
from ...ops.packed import packed_weight, parts
from ..check import FLOATS
from ..errors import CHOOSE_MODEL, DOWNLOAD_AGAIN, ModelFileError
from ..files import TensorFile, write_json
from ..klein import KleinConfig
from ..names import to_diffusers
from .interface import About, Format, Tensors, Writer, encode_layers, make_folder, packing

_FORMS = {mode: form for form, mode in MODES.items()}
#: What these fields may hold: group scales and zeros, with activations that are not quantised.
_ALLOWED = {"W_nbits": (1, 2, 4), "W_group_mode": tuple(_FORMS), "scaled_activations": (0,), "channel_scale_mode": (0,),
            "data_contiguous": (0, 1), **dict.fromkeys(("input_dtype", "output_dtype", "acc_dtype", "meta_dtype"),
                                                       tuple(DTYPES.values()))}
_PARTS = ("W_q", "scales", "zeros", "metadata", "orig_shape")
_OPTIONAL = ("meta_scale",)


def matches(file: TensorFile) -> bool:
    """Tensors called ``W_q``."""
    return any(name.endswith(".W_q") and isinstance(value, torch.Tensor) for name, value in file.tensors.items())


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors; the metadata of each layer says how it is packed. Raises ModelFileError."""
    stored = file.take_pickle()
    result = {}
    for layer in file.each(name.removesuffix(".W_q") for name in stored if name.endswith(".W_q")):
        tables = {part: stored.pop(f"{layer}.{part}", None) for part in _PARTS}
        missing = [part for part, tensor in tables.items() if tensor is None]
        if missing:
            raise ModelFileError(file.path, f"{layer}.{missing[0]}", "none", DOWNLOAD_AGAIN)
        for part in _OPTIONAL:
            stored.pop(f"{layer}.{part}", None)
        weight = _weight(file.path, layer, **tables)
        file.compare_packing(parts(weight).bits, parts(weight).group)
        result[f"{layer}.weight"] = weight
    return result | stored


def _weight(path: Path, layer: str, W_q, scales, zeros, metadata, orig_shape) -> QuantizedTensor:
    integers = all(part.dtype in (torch.int32, torch.int64) for part in (metadata, orig_shape))
    if not integers or metadata.shape != (len(METADATA),) or orig_shape.shape != (2,) or W_q.ndim != 2:
        raise ModelFileError(path, f"{len(METADATA)} integer metadata fields and a 2-D weight in {layer}",
                             f"{metadata.numel()} of {metadata.dtype} and {W_q.ndim}-D",
                             "use a file made with GemLite 0.5 or newer")
    meta = dict(zip(METADATA, metadata.tolist(), strict=True))
    (n, k), bits, group = orig_shape.tolist(), meta["W_nbits"], meta["group_size"]
    odd = [f"{key} {meta[key]}" for key, values in _ALLOWED.items() if meta[key] not in values]
    if odd:
        raise ModelFileError(path, f"{layer} packed at 1, 2 or 4 bits with group scales and zeros", ", ".join(odd),
                             CHOOSE_MODEL)
    form = _FORMS[meta["W_group_mode"]]
    width = {torch.uint8: 8, torch.int32: 32}.get(W_q.dtype)
    words = None if width is None else (k * bits // width, n)
    consistent = (tuple(W_q.shape) == words and group >= 1 and k % group == 0
                  and tuple(scales.shape) == (k // group, n) and scales.shape == zeros.shape
                  and meta["elements_per_sample"] == width // bits and meta["unpack_mask"] == 2**bits - 1)
    if not consistent:
        raise ModelFileError(path, f"{layer} of {n} x {k} at {bits} bits in groups of {group}, as its metadata says",
                             f"W_q {tuple(W_q.shape)} with scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)}",
                             DOWNLOAD_AGAIN)
    if scales.dtype not in FLOATS or scales.dtype != zeros.dtype:
        raise ModelFileError(path, f"scales and zeros of {layer} in one of BF16, FP16 and FP32",
                             f"{scales.dtype} and {zeros.dtype}", DOWNLOAD_AGAIN)
    codes = from_w_q(W_q)
    scale, shift = (table.t().contiguous() for table in (scales, zeros))
    symmetric = form == "affine" and bits <= 2 and torch.equal(scale, -shift if bits == 2 else -2 * shift)
    if symmetric:
        scale, shift = narrow_scales(-shift)[0], None
        return packed_weight(codes, scale, bits, dtype=scale.dtype)
    scale, shift = narrow_scales(scale, shift)
    return packed_weight(codes, scale, bits, form, shift, dtype=scale.dtype)


def from_w_q(w_q: torch.Tensor) -> torch.Tensor:
    """``W_q`` of packing width 8 (uint8) or 32 (int32), stored ``(packed K, N)`` -> canonical codes."""
    return w_q.t().contiguous().view(torch.uint8)


def narrow_scales(*tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Float tables in the smallest common dtype of BF16, FP16 and FP32 that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        narrowed = tuple(table.to(dtype) for table in tables)
        if all(torch.equal(small.to(table.dtype), table) for small, table in zip(narrowed, tables, strict=True)):
            return narrowed
    return tables


def encode(tensors: Tensors) -> Tensors:
    """Canonical tensors -> those of a ``state_dict.pt`` with packing width 8."""
    return encode_layers(tensors, _encode)


def _encode(layer: str, weight: QuantizedTensor) -> Tensors:
    packed = parts(weight)
    if packed.shift is not None:
        scales, zeros = packed.scale.float(), packed.shift.float()
    elif packed.bits <= 2:
        zeros = -packed.scale.float()
        scales = -zeros * (2 if packed.bits == 1 else 1)
    else:
        raise ValueError(f"symmetric {packed.bits}-bit weights have no GemLite form")
    form = "affine" if packed.form == "symmetric" else packed.form
    return {
        f"{layer}.W_q": packed.codes.t().contiguous(),
        f"{layer}.scales": scales.t().contiguous(),
        f"{layer}.zeros": zeros.t().contiguous(),
        f"{layer}.metadata": torch.tensor(metadata_fields(packed, MODES[form], torch.float16), dtype=torch.int32),
        f"{layer}.orig_shape": torch.tensor((packed.n, packed.k), dtype=torch.int32),
    }


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About) -> None:
    """A folder like ``transformer-gemlite-int2`` of the published repositories."""
    tensors = to_diffusers(tensors)
    # The publisher's loader asks for the packing width, and for a table of autotuned launches, which may be empty.
    make_folder(path, config, {**packing(tensors), "packing_bitwidth": 8})
    write_json(path / "gemlite_autotune.json", {})
    torch.save(encode(tensors), path / "state_dict.pt")


FORMAT = Format("gemlite", matches, decode, {"gemlite": Writer(write)})
