"""What a format is. A file of this folder describes one as ``FORMAT``, and ``__init__`` lists it: that is all it takes.

Tensors are canonical inside the program: packed weights as ``ops/packed.py`` defines them, dense ones as they are. A
file's names stay its own until :mod:`..names` brings them to another convention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.packed import is_packed, parts
from ..files import Reader, TensorFile, write_json
from ..klein import KleinConfig

Tensors = dict[str, torch.Tensor]


class About(NamedTuple):
    """What a written file says of itself: its variant (``ternary``, ``binary`` ...) and where the weights came from."""

    variant: str
    source: str


@dataclass(frozen=True)
class Writer:
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


@dataclass(frozen=True)
class Format:
    """One way in which files hold weights."""

    name: str
    #: Whether the file, judged by its tensors' names and dtypes, is of this format.
    matches: Callable[[TensorFile], bool]
    #: The canonical tensors under the file's own names. Raises ValueError where the file contradicts its format or
    #: holds what is not read here, and ModelFileError where the user can do something about it.
    decode: Callable[[TensorFile], Tensors]
    #: By the name under which ``convert --to`` offers them.
    writers: Mapping[str, Writer] = field(default_factory=dict)
    #: Suffix (lower case) -> how to read a container other than safetensors and pickles.
    readers: Mapping[str, Reader] = field(default_factory=dict)
    #: False where entries of a file may be something other than tensors, which ``decode`` then checks.
    only_tensors: bool = True


def decode_layers(file: TensorFile, layers: Iterable[str], decode: Callable[[str], torch.Tensor]) -> Tensors:
    """The weights of ``layers`` by name, each as ``decode(layer)`` returns it, with progress.

    Raises ValueError, with the layer's name, where ``decode`` does.
    """
    result: Tensors = {}
    for layer in file.each(layers):
        try:
            result[f"{layer}.weight"] = decode(layer)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
    return result


def take(stored: dict[str, Any], layer: str, *names: str) -> list[torch.Tensor]:
    """Remove the tensors ``{layer}.{name}`` from ``stored`` and return them. Raises ValueError if one is missing."""
    tensors = [stored.pop(f"{layer}.{name}", None) for name in names]
    if missing := [name for name, tensor in zip(names, tensors, strict=True) if tensor is None]:
        raise ValueError(f"no {missing[0]}")
    return tensors


def encode_layers(tensors: Tensors, encode: Callable[[str, QuantizedTensor], Tensors]) -> Tensors:
    """The tensors to store: dense ones as they are, packed ones as ``encode(layer, weight)`` stores them.

    Raises ValueError, with the weight's name, where ``encode`` does.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        if not is_packed(tensor):
            result[name] = tensor.contiguous()
            continue
        try:
            result |= encode(name.removesuffix(".weight"), tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return result


def make_folder(path: Path, config: KleinConfig) -> None:
    """A new folder at ``path`` with the JSON file that describes the diffusion model to come."""
    path.mkdir()
    write_json(path / "config.json", {"_class_name": "Flux2Transformer2DModel", **config.diffusers()})


def make_packed_folder(path: Path, config: KleinConfig, tensors: Tensors, **more: int) -> None:
    """The same with the JSON file that states bits and group size, those of the first packed weight, and ``more``."""
    make_folder(path, config)
    packed = next(parts(tensor) for tensor in tensors.values() if is_packed(tensor))
    write_json(path / "quantization_config.json", {"bits": packed.bits, "group_size": packed.group, **more})
