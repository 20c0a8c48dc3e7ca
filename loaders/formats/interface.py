"""What a format is. A file of this folder describes one as ``FORMAT``, and ``__init__`` lists it: that is all it takes.

Tensors are canonical inside the program: packed weights as ``ops/packed.py`` defines them, dense ones as they are. A
file's names stay its own until :mod:`..names` brings them to another convention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    #: The canonical tensors under the file's own names. Raises ModelFileError, or ValueError where a tensor does not
    #: hold what the format says.
    decode: Callable[[TensorFile], Tensors]
    #: By the name under which ``convert --to`` offers them.
    writers: Mapping[str, Writer] = field(default_factory=dict)
    #: Suffix (lower case) -> how to read a container other than safetensors and pickles.
    readers: Mapping[str, Reader] = field(default_factory=dict)
    #: False where entries of a file may be something other than tensors, which ``decode`` then checks.
    only_tensors: bool = True


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


def packing(tensors: Tensors) -> dict[str, Any]:
    """``bits`` and ``group_size`` of the first packed weight, as the folders' JSON files state them."""
    packed = next(parts(tensor) for tensor in tensors.values() if is_packed(tensor))
    return {"bits": packed.bits, "group_size": packed.group}


def make_folder(path: Path, config: KleinConfig, quantization: dict[str, Any] | None = None) -> None:
    """A new folder at ``path`` with the JSON files that describe the weights to come."""
    path.mkdir()
    write_json(path / "config.json", {"_class_name": "Flux2Transformer2DModel", **config.diffusers()})
    if quantization is not None:
        write_json(path / "quantization_config.json", quantization)
