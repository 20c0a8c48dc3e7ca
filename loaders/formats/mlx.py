"""MLX files: safetensors with, per packed layer, ``weight`` uint32 ``(N, K * bits / 32)`` and ``scales`` and
``biases`` ``(N, K / group)``; ``w = scale * code + bias``.

The diffusion model uses group 128 at 1 or 2 bits: ternary has bias ``-scale``; binary has scale ``2 s`` and bias
``-s``. The text encoder (MLX affine, 4 bits, group 64) also packs its embedding.

Source: the MLX quantization documentation, and files written with ``mlx.core.quantize`` (``tests/test_formats.py``).
"""

from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from ...ops.packed import unwrap
from .. import klein, qwen3
from ..check import check_scales
from ..files import TensorFile
from ..names import to_diffusers
from .interface import About, Format, Tensors, Writer, decode_layers, encode_layers, from_affine, make_folder, to_affine


def matches(file: TensorFile) -> bool:
    """uint32 words, and scales under MLX's name."""
    return any(name.endswith(".scales") for name in file.tensors) and any(
        tensor.dtype == torch.uint32 for tensor in file.tensors.values() if isinstance(tensor, torch.Tensor))


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors. Words alone do not say at how many bits they are packed: the shapes that the model has to
    have do, and JSON files that say otherwise only earn a warning."""
    if klein.is_klein(file.tensors):
        stored = dict(file.tensors)
        shapes = klein.shapes(klein.read_config(file.path, stored), stored)
    else:
        stored = qwen3.normalise(file.path, file.tensors)
        shapes = qwen3.qwen3_shapes(qwen3.read_config(file.path, stored))
    layers = [name.removesuffix(".weight") for name, tensor in stored.items()
              if tensor.dtype == torch.uint32 and name in shapes]

    def weight(layer: str, words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> QuantizedTensor:
        check_scales(scales, biases)
        shape = shapes[f"{layer}.weight"]
        bits, rest = divmod(words.shape[-1] * 32, shape[-1]) if words.ndim == 2 else (0, 1)
        if rest:
            raise ValueError(f"words {tuple(words.shape)} for a weight {shape}")
        return from_affine(from_words(words), scales, biases, bits)

    return decode_layers(file, stored, layers, ("weight", "scales", "biases"), weight)


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


def _encode(weight: QuantizedTensor) -> Tensors:
    packed = unwrap(weight)
    scales, biases = to_affine(packed)
    return {"weight": to_words(packed.codes), "scales": scales.contiguous(), "biases": biases.contiguous()}


def write(path: Path, tensors: Tensors, config: klein.KleinConfig, about: About) -> None:
    """A folder like ``transformer-packed-mflux`` of the published repositories."""
    tensors = to_diffusers(tensors)
    make_folder(path, config, tensors)
    save_file(encode(tensors), path / "diffusion_pytorch_model.safetensors")


FORMAT = Format("mlx", matches, decode, {"mlx": Writer(write)})
