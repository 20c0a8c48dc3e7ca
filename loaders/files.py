"""Reading tensor files from disk: safetensors (memory-mapped), pickles of tensors (never executed), JSON beside them.

A :class:`TensorFile` is what every format module decodes. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .errors import DOWNLOAD_AGAIN, PackError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
TENSOR_SUFFIXES = SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES

#: What ``torch.load(weights_only=True)`` raises on damaged or hostile bytes: its unpickler and zip reader pass on
#: whatever they stumble over.
_UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError,
                      AttributeError, AssertionError, OverflowError, MemoryError, ImportError, struct.error, OSError)


@dataclass
class TensorFile:
    """Tensors by name, as stored, with the file's own metadata and the JSON files of its folder."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    @property
    def is_pickle(self) -> bool:
        return self.path.suffix in PICKLE_SUFFIXES


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``{}`` if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise PackError(path, "a JSON object", f"unreadable text ({type(error).__name__})", DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise PackError(path, "a JSON object", f"a {type(value).__name__}", DOWNLOAD_AGAIN)
    return value


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Memory-mapped tensors and the metadata of one safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise PackError(path, "a whole safetensors file", f"a damaged or truncated one ({_first_line(error)})",
                        DOWNLOAD_AGAIN) from error


def read_pickle(path: Path, mmap: bool) -> dict[str, Any]:
    """A pickled dict, through torch's restricted unpickler: nothing in the file can run.

    With ``mmap`` the tensors stay on disk until touched; without, they are read, and freed as they are dropped.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _UNPICKLING_ERRORS as error:
        raise PackError(path, "a PyTorch file of plain tensors", f"one not safe to read ({_first_line(error)})",
                        "download it again from its publisher, or use the MLX pack") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PackError(path, "a dict of tensors by name", f"a {type(value).__name__}", "choose another file")
    return value


def _first_line(error: Exception) -> str:
    """The gist of an error, fit to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:; ")[:160]


def tensor_files(path: Path) -> list[Path]:
    """The tensor files of a model: ``path`` itself, the shards its folder's index names, or the folder's one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PackError(path, "a file or folder", "nothing there", "check the path")
    for index in sorted(path.glob("*.safetensors.index.json")):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PackError(index, "a weight_map", "none", DOWNLOAD_AGAIN)
        shards = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in shards if Path(name).name != name or not (path / name).is_file()]
        if missing:
            raise PackError(path / missing[0], "the shard that the index names", "no such file", DOWNLOAD_AGAIN)
        return [path / name for name in shards]
    found = sorted(child for child in path.iterdir() if child.suffix in TENSOR_SUFFIXES)
    if not found:
        raise PackError(path, f"a tensor file ({', '.join(SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES[:1])})", "none",
                        "choose the folder that holds the weights")
    if len(found) > 1:
        raise PackError(path, "one tensor file, or shards with an index", f"{len(found)} files",
                        "choose one of the files instead of the folder")
    return found


def open_tensors(path: Path) -> TensorFile:
    """Open the model at ``path``, a file or folder, with the JSON files of its folder."""
    files = tensor_files(path)
    folder = files[0].parent
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix in PICKLE_SUFFIXES:
            tensors.update(read_pickle(file, mmap=True))
        else:
            part, metadata = read_safetensors(file)
            tensors.update(part)
    return TensorFile(
        path=files[0] if len(files) == 1 else folder,
        tensors=tensors,
        metadata=metadata,
        config=read_json(folder / "config.json"),
        quantization=read_json(folder / "quantization_config.json"),
    )
