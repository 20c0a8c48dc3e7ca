"""GemLite files: a pickle (``state_dict.pt``) of tensors, per packed layer

``W_q``        uint8 ``(K * bits / 8, N)`` or int32 ``(K * bits / 32, N)``: packed along K, stored transposed
``scales``     float32 ``(K / group, N)``; in published files every value is a BF16 number
``zeros``      like ``scales``, by ``W_group_mode``: 4 ``w = code * scale + zeros``; 3 ``w = (code - zeros) * scale``
``metadata``   int32[12], see ``ops/backends/gemlite_backend.py``
``orig_shape`` (N, K)

and optionally ``bias`` and ``meta_scale``. Ternary weights have ``zeros == -scales``, binary ones ``-scales / 2``.

Source: GemLite 0.5 and 0.6, ``GemLiteLinearTriton.pack`` (``tests/test_formats.py`` loads what it writes and has it
load what is written here).
"""

from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.backends.gemlite_backend import DTYPES, METADATA, MODES, metadata_fields
from ...ops.packed import packed_weight, unwrap
from ..check import check_scales
from ..files import TensorFile, write_json
from ..klein import KleinConfig
from ..names import to_diffusers
from .interface import About, Format, Tensors, Writer, decode_layers, encode_layers, from_affine, make_folder, to_affine

_FORMS = {mode: form for form, mode in MODES.items()}
#: What these fields may hold: group scales and zeros, with activations that are not quantized.
_ALLOWED = {"W_nbits": (1, 2, 4), "W_group_mode": tuple(_FORMS), "scaled_activations": (0,), "channel_scale_mode": (0,),
            "data_contiguous": (0, 1), **dict.fromkeys(("input_dtype", "output_dtype", "acc_dtype", "meta_dtype"),
                                                       tuple(DTYPES.values()))}


def matches(file: TensorFile) -> bool:
    """Tensors called ``W_q``."""
    return any(name.endswith(".W_q") and isinstance(value, torch.Tensor) for name, value in file.tensors.items())


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors; the metadata of each layer says how it is packed."""
    stored = file.take_pickle()
    layers = [name.removesuffix(".W_q") for name in stored if name.endswith(".W_q")]
    for layer in layers:
        stored.pop(f"{layer}.meta_scale", None)
    return decode_layers(file, stored, layers, ("W_q", "scales", "zeros", "metadata", "orig_shape"), _weight)


def _weight(_layer: str, w_q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, metadata: torch.Tensor,
            orig_shape: torch.Tensor) -> QuantizedTensor:
    if metadata.dtype not in (torch.int32, torch.int64) or metadata.shape != (len(METADATA),):
        raise ValueError(f"metadata {tuple(metadata.shape)} in {metadata.dtype}, not the {len(METADATA)} integers "
                         "that GemLite 0.5 and newer write")
    meta = dict(zip(METADATA, metadata.tolist(), strict=True))
    if odd := [f"{key} {meta[key]}" for key, values in _ALLOWED.items() if meta[key] not in values]:
        raise ValueError(f"{', '.join(odd)}, which is not read here")
    if w_q.dtype not in (torch.uint8, torch.int32) or w_q.ndim != 2:
        raise ValueError(f"W_q {tuple(w_q.shape)} in {w_q.dtype}")
    check_scales(scales, zeros)
    bits, form = meta["W_nbits"], _FORMS[meta["W_group_mode"]]
    scale, shift = narrow_scales(scales.t().contiguous(), zeros.t().contiguous())
    weight = (from_affine(from_w_q(w_q), scale, shift, bits) if form == "affine" else
              packed_weight(from_w_q(w_q), scale, bits, form, shift, dtype=scale.dtype))
    stated = (orig_shape.tolist(), meta["group_size"], meta["elements_per_sample"], meta["unpack_mask"])
    if stated != (list(weight.shape), unwrap(weight).group, w_q.element_size() * 8 // bits, 2**bits - 1):
        raise ValueError(f"W_q {tuple(w_q.shape)} and scales {tuple(scales.shape)}, where the metadata say "
                         f"{stated[0]} at {bits} bits in groups of {stated[1]}")
    return weight


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


def _encode(weight: QuantizedTensor) -> Tensors:
    packed = unwrap(weight)
    scales, zeros = (packed.scale, packed.shift) if packed.shift is not None else to_affine(packed)
    mode = MODES["affine" if packed.form == "symmetric" else packed.form]
    return {
        "W_q": packed.codes.t().contiguous(),
        "scales": scales.float().t().contiguous(),
        "zeros": zeros.float().t().contiguous(),
        "metadata": torch.tensor(metadata_fields(packed, mode, torch.float16), dtype=torch.int32),
        "orig_shape": torch.tensor((packed.n, packed.k), dtype=torch.int32),
    }


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About) -> None:
    """A folder like ``transformer-gemlite-int2`` of the published repositories."""
    tensors = to_diffusers(tensors)
    # The publisher's loader asks for the packing width, and for a table of autotuned launches, which may be empty.
    make_folder(path, config, tensors, packing_bitwidth=8)
    write_json(path / "gemlite_autotune.json", {})
    torch.save(encode(tensors), path / "state_dict.pt")


FORMAT = Format("gemlite", matches, decode, {"gemlite": Writer(write)})
