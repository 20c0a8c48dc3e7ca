"""Unpacked weights: dense safetensors in diffusers' or ComfyUI's names (or a dense Qwen3 text encoder).

The unpacked Bonsai diffusion models hold only ``{-s, 0, s}`` (ternary) or ``{-s, s}`` (binary) in every group of 128
along K, so packing them loses nothing. Other people's may in groups of 64 or 32. Where a single group does not fit, the
file is no such model and is refused.
"""

import contextlib
import reprlib
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from ...ops.packed import dequantize, is_packed, pack_codes, packed_weight, unwrap
from .. import klein, names
from ..check import FLOATS
from ..errors import refusing
from ..files import TensorFile, write_json
from ..klein import KleinConfig, is_klein
from .interface import About, Format, Tensors, Writer, decode_layers, make_folder

#: Bits and group, in the order in which they are tried. Binary before ternary: a ternary model fails it at its first
#: layer, whereas the reverse would accept any binary one. One for all layers: ComfyUI joins q, k and v, and the JSON of
#: the formats in folders states one group.
_PACKINGS = tuple((bits, group) for group in (128, 64, 32) for bits in (1, 2))
_SHARD_SIZE = "1GB"
_WEIGHTS = "diffusion_pytorch_model"


def matches(file: TensorFile) -> bool:
    """Nothing but floating-point tensors."""
    return bool(file.tensors) and all(
        isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS for tensor in file.tensors.values())


def decode(file: TensorFile) -> Tensors:
    """The tensors, those inside the blocks of a diffusion model packed. Raises ModelFileError where they do not fit."""
    tensors = names.normalise(file.path, file.tensors)
    if not is_klein(tensors):
        return tensors
    layers = [name.removesuffix(".weight") for name in tensors if klein.is_packable(name) and name.endswith(".weight")]

    def packed(bits: int, group: int) -> Tensors:
        return decode_layers(file, dict(tensors), layers, ["weight"], lambda _, weight: from_dense(weight, bits, group))

    with refusing(file.path, "a Bonsai model, every group of 128, 64 or 32 weights -s, 0 or s",
                  "load an ordinary FLUX.2 model with ComfyUI's Load Diffusion Model instead", ValueError):
        for packing in _PACKINGS[:-1]:
            with contextlib.suppress(ValueError):
                return packed(*packing)
        return packed(*_PACKINGS[-1])


def expand(tensor: torch.Tensor) -> torch.Tensor:
    """The dense weight of a packed one, in the dtype of its scales, which holds it exactly; a dense one as it is.

    Raises ValueError for a form whose values that dtype cannot hold.
    """
    if not is_packed(tensor):
        return tensor.contiguous()
    packed = unwrap(tensor)
    if packed.form != "symmetric" or packed.bits > 2:
        raise ValueError(f"{packed.bits}-bit {packed.form} weights cannot be expanded without rounding")
    return dequantize(packed, packed.scale.dtype)


def from_dense(weight: torch.Tensor, bits: int, group: int) -> QuantizedTensor:
    """Dense weight ``(N, K)`` -> packed weight, with scales ``(N, K / group)`` in the weight's dtype.

    Raises ValueError, naming the first offending group, unless every group holds only ``{-s, 0, s}`` (2 bits) or
    ``{-s, s}`` (1 bit). A ternary group of zeros has scale 0 and code 1 throughout.
    """
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no whole groups of {group} along K")
    groups = weight.reshape(weight.shape[0], -1, group)
    scale = groups.abs().amax(-1)
    fits = groups.abs() == scale[..., None]
    if bits == 2:
        fits |= groups == 0
    if not bool(fits.all()):
        row, index = (~fits.all(-1)).nonzero()[0].tolist()
        values = reprlib.repr(groups[row, index].unique().tolist())
        raise ValueError(f"row {row}, group {index} holds {values}, not {'-s and s' if bits == 1 else '-s, 0 and s'}")
    codes = groups > 0 if bits == 1 else groups.sign() + 1
    return packed_weight(pack_codes(codes.to(torch.uint8).view(weight.shape), bits), scale, bits, dtype=weight.dtype)


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About) -> None:
    """A folder in diffusers' layout. One shard is expanded at a time: the whole dense model never exists in memory."""
    make_folder(path, config)
    tensors = names.to_diffusers(tensors)
    outlines = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    from huggingface_hub import split_torch_state_dict_into_shards  # a library that loading does not need

    split = split_torch_state_dict_into_shards(outlines, filename_pattern=f"{_WEIGHTS}{{suffix}}.safetensors",
                                               max_shard_size=_SHARD_SIZE)
    for filename, shard in split.filename_to_tensors.items():
        save_file({name: expand(tensors[name]) for name in shard}, path / filename, {"format": "pt"})
    if split.is_sharded:
        write_json(path / f"{_WEIGHTS}.safetensors.index.json",
                   {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


#: Dense weights do not say which codes they came from where a whole group is zero, or a scale negative.
FORMAT = Format("dense", matches, decode, {"diffusers": Writer(write, keeps_codes=False)})
