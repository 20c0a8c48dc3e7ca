"""MLX packs: safetensors with, per packed layer, ``weight`` uint32 ``(N, K * bits / 32)`` and ``scales`` and
``biases`` ``(N, K / group)``; ``w = scale * code + bias``.

The diffusion model uses group 128 at 1 or 2 bits: ternary has bias ``-scale``; binary has scale ``2 s`` and bias
``-s``. The text encoder (MLX affine, 4 bits, group 64) also packs its embedding.

Source: the MLX quantisation documentation, and packs written with ``mlx.core.quantize`` (``tests/test_formats.py``).
"""

from __future__ import annotations

import reprlib
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from ...ops.packed import packed_weight
from ..check import FLOATS
from ..errors import DOWNLOAD_AGAIN, ModelFileError
from ..files import TensorFile
from ..klein import KleinConfig, is_klein
from ..names import to_diffusers
from .interface import About, Format, Tensors, Writer, encode_layers, make_folder, packing

#: Group size where no JSON file states one.
_GROUP_TRANSFORMER, _GROUP_TEXT_ENCODER = 128, 64


def matches(file: TensorFile) -> bool:
    return any(name.endswith(".scales") for name in file.tensors) and any(
        tensor.dtype == torch.uint32 for tensor in file.tensors.values() if isinstance(tensor, torch.Tensor))


def decode(file: TensorFile) -> dict[str, torch.Tensor]:
    stated_bits, stated_group = file.stated_packing()
    default = _GROUP_TRANSFORMER if is_klein(file.tensors) else _GROUP_TEXT_ENCODER
    group = default if stated_group is None else stated_group
    result = {}
    for name in file.each(file.tensors):
        tensor = file.tensors[name]
        layer, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if tensor.dtype != torch.uint32:
            result[name] = tensor
            continue
        scales, biases = (file.tensors.get(f"{layer}.{part}") for part in ("scales", "biases"))
        if scales is None or biases is None or scales.shape != biases.shape or scales.ndim != 2:
            raise ModelFileError(file.path, f"scales and biases of one shape beside {name}", "them missing or unequal",
                                 DOWNLOAD_AGAIN)
        if scales.dtype not in FLOATS or scales.dtype != biases.dtype:
            raise ModelFileError(file.path, f"scales and biases of {layer} in one of BF16, FP16 and FP32",
                                 f"{scales.dtype} and {biases.dtype}", DOWNLOAD_AGAIN)
        result[name] = _weight(file, name, tensor, scales, biases, stated_bits, group)
    packed = {name for name, tensor in file.tensors.items() if tensor.dtype == torch.uint32}
    orphans = [name for name in file.tensors if name.endswith((".scales", ".biases"))
               and f"{name.rpartition('.')[0]}.weight" not in packed]
    if orphans:
        raise ModelFileError(file.path, f"a packed weight beside {orphans[0]}", "none", DOWNLOAD_AGAIN)
    return result


def _weight(file, name, words, scales, biases, stated_bits, group) -> QuantizedTensor:
    # words * 32 = K * bits and scales = K / group, so the shapes fix bits * group.
    bits = next((bits for bits in (1, 2, 4) if words.ndim == 2 and type(group) is int
                 and words.shape[1] * 32 == scales.shape[1] * group * bits), None)
    if bits is None or words.shape[0] != scales.shape[0]:
        raise ModelFileError(file.path, f"{name} packed at 1, 2 or 4 bits in groups of {reprlib.repr(group)}",
                             f"words {tuple(words.shape)} with scales {tuple(scales.shape)}", DOWNLOAD_AGAIN)
    if stated_bits not in (None, bits):
        raise ModelFileError(file.path, f"{reprlib.repr(stated_bits)} bits as the configuration says",
                             f"{bits} in the shapes of {name}", "download the whole folder again")
    codes = from_words(words)
    if bits == 2 and torch.equal(biases, -scales):
        return packed_weight(codes, scales, bits, dtype=scales.dtype)
    if bits == 1 and torch.equal(scales, -2 * biases):
        return packed_weight(codes, -biases, bits, dtype=scales.dtype)
    return packed_weight(codes, scales, bits, "affine", biases, dtype=scales.dtype)


def from_words(words: torch.Tensor) -> torch.Tensor:
    """uint32 words ``(N, W)`` -> canonical codes ``(N, 4 * W)``, a view: their little-endian bytes are the codes."""
    return words.contiguous().view(torch.uint8)


def to_words(codes: torch.Tensor) -> torch.Tensor:
    """Canonical codes -> uint32 words, a view where alignment allows."""
    if codes.shape[1] % 4:
        raise ValueError(f"rows of {codes.shape[1]} bytes do not fill 32-bit words")
    codes = codes.contiguous()
    if codes.storage_offset() % 4 or codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.uint32)


def encode(tensors: Tensors) -> Tensors:
    """Canonical tensors -> those of an MLX file. Raises ValueError for a form that MLX lacks."""
    return encode_layers(tensors, _encode)


def _encode(layer: str, weight: QuantizedTensor) -> Tensors:
    params = weight._params
    if params.form == "affine":
        scales, biases = params.scale, params.shift
    elif params.form == "symmetric" and params.bits <= 2:
        scales, biases = params.scale * (2 if params.bits == 1 else 1), -params.scale
    else:
        raise ValueError(f"MLX cannot hold {params.bits}-bit {params.form} weights without rounding")
    return {f"{layer}.weight": to_words(weight._qdata), f"{layer}.scales": scales.contiguous(),
            f"{layer}.biases": biases.contiguous()}


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About) -> None:
    """A folder like ``transformer-packed-mflux`` of the published repositories."""
    tensors = to_diffusers(tensors)
    make_folder(path, config, packing(tensors))
    save_file(encode(tensors), path / "diffusion_pytorch_model.safetensors", {"format": "mlx"})


FORMAT = Format("mlx", matches, decode, {"mlx": Writer(write)})
