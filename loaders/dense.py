"""Unpacked weights: dense safetensors in diffusers' or ComfyUI's names (or a dense Qwen3 text encoder).

The unpacked Bonsai diffusion models hold only ``{-s, 0, s}`` (ternary) or ``{-s, s}`` (binary) in every group of 128
along K, so packing them loses nothing. Where a single group does not fit, the file is not Bonsai and is refused.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..ops import codecs
from ..ops.packed import packed_weight
from . import names
from .check import FLOATS
from .errors import ModelFileError
from .files import TensorFile
from .klein import is_klein

NAME = "dense"
GROUP = 128


def matches(file: TensorFile) -> bool:
    return bool(file.tensors) and all(
        isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS for tensor in file.tensors.values())


def decode(file: TensorFile) -> dict[str, torch.Tensor]:
    tensors = names.normalise(file.path, file.tensors)
    if not is_klein(tensors):
        return tensors
    try:
        # Binary first: a ternary model fails it at its first layer, whereas the reverse would accept any binary one.
        return _pack(file, tensors, bits=1)
    except ValueError:
        pass
    try:
        return _pack(file, tensors, bits=2)
    except ValueError as error:
        raise ModelFileError(file.path, "a Bonsai model, every group of 128 weights -s, 0 or s", str(error),
                             "load an ordinary FLUX.2 model with ComfyUI's Load Diffusion Model instead") from error


def _pack(file: TensorFile, tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    result = {}
    for name in file.each(tensors):
        tensor = tensors[name]
        if names.is_packable(name):
            try:
                codes, scale = codecs.from_dense(tensor, bits, GROUP)
            except ValueError as error:
                raise ValueError(f"{name} where {error}") from None
            result[name] = packed_weight(codes, scale, bits, dtype=tensor.dtype)
        else:
            result[name] = tensor
    return result


def expand(tensor: torch.Tensor) -> torch.Tensor:
    """The dense weight of a packed one, in the dtype of its scales, which holds it exactly; a dense one as it is.

    Raises ValueError for a form whose values that dtype cannot hold.
    """
    if not isinstance(tensor, QuantizedTensor):
        return tensor.contiguous()
    if tensor._params.form != "symmetric" or tensor._params.bits > 2:
        raise ValueError(f"{tensor._params.bits}-bit {tensor._params.form} weights cannot be expanded without rounding")
    return tensor.to(dtype=tensor._params.scale.dtype).dequantize()
