"""What a format is. A file of this folder describes one as ``FORMAT``, and ``__init__`` lists it: that is all it takes.

Tensors are canonical inside the program: packed weights as ``ops/packed.py`` defines them, dense ones as they are. A
file's names stay its own until :mod:`..names` brings them to another convention.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.packed import LEVELS, Packed, is_packed, packed_weight, unwrap
from ..files import Reader, TensorFile, write_json
from ..klein import KleinConfig
from ..qwen3 import is_qwen3

Tensors = dict[str, torch.Tensor]


class About(NamedTuple):
    """What a written file says of itself: its variant (``ternary``, ``binary`` ...) and where the weights came from."""

    variant: str
    source: str


class Writer(NamedTuple):
    """One choice of ``convert --to``.

    ``write(path, tensors, config, about)`` writes the diffusion model ``tensors`` (canonical, in either naming
    convention) to ``path``, which does not exist yet. It raises ValueError where the format cannot hold the weights
    exactly, naming the first of them.
    """

    write: Callable[[Path, Tensors, KleinConfig, About], None]
    #: Endings of the one file that is written; empty where it is a folder.
    suffixes: tuple[str, ...] = ()
    #: False where a weight comes back with the same values, but not always as the same codes and scales.
    keeps_codes: bool = True


class Format(NamedTuple):
    """One way in which files hold weights."""

    name: str
    #: Whether the file, judged by its tensors' names and dtypes, is of this format.
    matches: Callable[[TensorFile], bool]
    #: The canonical tensors under the file's own names. Raises ValueError where the file contradicts its format or
    #: holds what is not read here, and ModelFileError where the user can do something about it.
    decode: Callable[[TensorFile], Tensors]
    #: By the name under which ``convert --to`` offers them.
    writers: Mapping[str, Writer] = MappingProxyType({})
    #: Suffix (lower case) -> how to read a container other than safetensors and pickles.
    readers: Mapping[str, Reader] = MappingProxyType({})
    #: False where entries of a file may be something other than tensors, which ``decode`` then checks.
    only_tensors: bool = True


def host_loader(file: TensorFile) -> str:
    """What to do with a quantization that is the host's own to read."""
    name = "Load CLIP, type flux2," if is_qwen3(file.tensors) else "Load Diffusion Model"
    return f"load it with ComfyUI's own {name} instead"


def decode_layers(file: TensorFile, stored: dict[str, Any], layers: Iterable[str], names: Collection[str],
                  decode: Callable[..., torch.Tensor]) -> Tensors:
    """All tensors of ``stored``, where a weight takes the place of the tensors ``names`` of each of ``layers``.

    ``decode(layer, *tensors)`` makes the weight. The tensors are removed from ``stored``, so that they can be freed one
    layer after the other. Raises ValueError, with the layer's name, where one is missing and where ``decode`` does.
    """
    result: Tensors = {}
    for layer in file.each(layers):
        if missing := [name for name in names if f"{layer}.{name}" not in stored]:
            raise ValueError(f"{layer}: no {missing[0]}")
        try:
            result[f"{layer}.weight"] = decode(layer, *[stored.pop(f"{layer}.{name}") for name in names])
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
    return result | stored


def from_affine(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int) -> QuantizedTensor:
    """The weight ``scale * code + shift``: symmetric where that is the same, as it is for Bonsai's diffusion models."""
    if bits <= 2 and torch.equal(scale, -LEVELS[bits][0] * shift):
        return packed_weight(codes, scale if bits == 2 else -shift, bits, dtype=scale.dtype)
    return packed_weight(codes, scale, bits, "affine", shift, dtype=scale.dtype)


def to_affine(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """``(scale, shift)`` of the weight as ``scale * code + shift``. Raises ValueError where that would round it."""
    if packed.form == "affine" and packed.shift is not None:
        return packed.scale, packed.shift
    if packed.form == "symmetric" and packed.bits <= 2:
        return packed.scale * LEVELS[packed.bits][0], -packed.scale
    raise ValueError(f"{packed.bits}-bit {packed.form} weights have no form scale * code + shift")


def encode_layers(tensors: Tensors, encode: Callable[[QuantizedTensor], Tensors]) -> Tensors:
    """The tensors to store: dense ones as they are, packed ones as ``encode(weight)`` names and stores them.

    Raises ValueError, with the weight's name, where ``encode`` does.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        if not is_packed(tensor):
            result[name] = tensor.contiguous()
            continue
        try:
            result |= {f"{name.removesuffix('weight')}{part}": value for part, value in encode(tensor).items()}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return result


def make_folder(path: Path, config: KleinConfig, tensors: Tensors | None = None, **more: int) -> None:
    """A new folder at ``path`` with the JSON file that describes the diffusion model to come.

    For packed ``tensors`` also the one that states bits and group size, those of the first of them, and ``more``.
    """
    path.mkdir()
    write_json(path / "config.json", {"_class_name": "Flux2Transformer2DModel", **config.diffusers()})
    if tensors is not None:
        packed = next(unwrap(tensor) for tensor in tensors.values() if is_packed(tensor))
        write_json(path / "quantization_config.json", {"bits": packed.bits, "group_size": packed.group, **more})
