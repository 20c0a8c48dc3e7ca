"""MLX files: safetensors with, per packed layer, ``weight`` uint32 ``(N, K * bits / 32)`` and ``scales`` and
``biases`` ``(N, K / group)``; ``w = scale * code + bias``.

The diffusion model uses group 128 at 1 or 2 bits: ternary has bias ``-scale``; binary has scale ``2 s`` and bias
``-s``. The text encoder (MLX affine, 4 bits, group 64) also packs its embedding.

Source: the MLX quantisation documentation, and files written with ``mlx.core.quantize`` (``tests/test_formats.py``).
"""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from ...ops.packed import packed_weight, parts
from .. import klein, qwen3
from ..check import FLOATS
from ..errors import DOWNLOAD_AGAIN, ModelFileError
from ..files import TensorFile
from ..klein import KleinConfig
from ..names import to_diffusers
from .interface import About, Format, Tensors, Writer, encode_layers, make_folder, packing


def matches(file: TensorFile) -> bool:
    """uint32 words, and scales under MLX's name."""
    return any(name.endswith(".scales") for name in file.tensors) and any(
        tensor.dtype == torch.uint32 for tensor in file.tensors.values() if isinstance(tensor, torch.Tensor))


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors. Words alone do not say at how many bits they are packed: the shapes that the model has to
    have do, and JSON files that say otherwise only earn a warning."""
    if klein.is_klein(file.tensors):
        stored, shapes = file.tensors, klein.shapes(file.path, file.tensors)
    else:
        stored = qwen3.normalise(file.path, file.tensors)
        shapes = qwen3.shapes(file.path, stored)
    result = {}
    packed = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.uint32}
    for name in file.each(stored):
        layer, _, kind = name.rpartition(".")
        if kind not in ("scales", "biases"):
            result[name] = stored[name]
            if layer in packed and name in shapes:
                result[name] = _weight(file.path, name, shapes[name], stored)
                file.compare_packing(parts(result[name]).bits, parts(result[name]).group)
        elif layer not in packed:
            raise ModelFileError(file.path, f"a packed weight beside {name}", "none", DOWNLOAD_AGAIN)
    return result


def _weight(path: Path, name: str, shape: tuple[int, ...], stored: Tensors) -> QuantizedTensor:
    layer = name.removesuffix(".weight")
    words, scales, biases = stored[name], stored.get(f"{layer}.scales"), stored.get(f"{layer}.biases")
    if scales is None or biases is None or scales.shape != biases.shape or scales.ndim != 2:
        raise ModelFileError(path, f"scales and biases of one shape beside {name}", "them missing or unequal",
                             DOWNLOAD_AGAIN)
    if scales.dtype not in FLOATS or scales.dtype != biases.dtype:
        raise ModelFileError(path, f"scales and biases of {layer} in one of BF16, FP16 and FP32",
                             f"{scales.dtype} and {biases.dtype}", DOWNLOAD_AGAIN)
    n, k = shape if len(shape) == 2 else (0, 0)
    bits = next((bits for bits in (1, 2, 4) if words.ndim == 2 and words.shape[0] == n
                 and words.shape[1] * 32 == k * bits), None)
    if bits is None or scales.shape[0] != n or k % scales.shape[1]:
        raise ModelFileError(path, f"{name} of shape {shape} at 1, 2 or 4 bits in whole groups",
                             f"words {tuple(words.shape)} with scales {tuple(scales.shape)}", DOWNLOAD_AGAIN)
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
    packed = parts(weight)
    if packed.form == "affine" and packed.shift is not None:
        scales, biases = packed.scale, packed.shift
    elif packed.form == "symmetric" and packed.bits <= 2:
        scales, biases = packed.scale * (2 if packed.bits == 1 else 1), -packed.scale
    else:
        raise ValueError(f"MLX cannot hold {packed.bits}-bit {packed.form} weights without rounding")
    return {f"{layer}.weight": to_words(packed.codes), f"{layer}.scales": scales.contiguous(),
            f"{layer}.biases": biases.contiguous()}


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About) -> None:
    """A folder like ``transformer-packed-mflux`` of the published repositories."""
    tensors = to_diffusers(tensors)
    make_folder(path, config, packing(tensors))
    save_file(encode(tensors), path / "diffusion_pytorch_model.safetensors", {"format": "mlx"})


FORMAT = Format("mlx", matches, decode, {"mlx": Writer(write)})
