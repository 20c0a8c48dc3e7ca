"""Which files a model consists of, and opening them: one file, or the shards that an index lists."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import formats
from .errors import DOWNLOAD_AGAIN, ModelFileError
from .files import (
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIXES,
    Progress,
    TensorFile,
    no_progress,
    read_json,
    read_pickle,
    read_safetensors,
)

Reader = Callable[[Path], tuple[dict[str, Any], dict[str, str]]]


def _readers() -> dict[str, Reader]:
    """Suffix -> what reads a file of that name."""
    readers: dict[str, Reader] = dict.fromkeys(SAFETENSORS_SUFFIXES, read_safetensors)
    readers |= dict.fromkeys(PICKLE_SUFFIXES, lambda path: (read_pickle(path, mmap=True), {}))
    for known in formats.FORMATS:
        readers |= known.readers
    return readers


def _shards(folder: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the folder's index says it holds; ``{}`` without one. Raises ModelFileError."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(index, "a weight_map", "none", DOWNLOAD_AGAIN)
        shards: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            shards.setdefault(str(name), set()).add(tensor)
        for name in shards:
            inside = Path(name).name == name and name.endswith(SAFETENSORS_SUFFIXES)
            if not inside or not os.path.isfile(folder / name):
                raise ModelFileError(index, "the names of safetensors files beside it",
                                     f"{reprlib.repr(name)}, which is none", "download the whole folder again")
        return shards
    return {}


def files_in(folder: Path) -> list[Path]:
    """The tensor files that lie in ``folder`` itself, sorted; their suffixes may be in any case."""
    return sorted(child for child in folder.iterdir() if child.suffix.lower() in _readers() and child.is_file())


def tensor_files(path: Path) -> list[Path]:
    """The tensor files of a model: ``path`` itself, the shards its folder's index names, or the folder's one file."""
    # os.path answers no, where Path raises, for a name that the system cannot hold.
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ModelFileError(path, "a file or folder", "nothing there", "check the path")
    if shards := _shards(path):
        return [path / name for name in sorted(shards)]
    found = files_in(path)
    if not found:
        raise ModelFileError(path, f"a tensor file ({', '.join(SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES[:1])})", "none",
                             "choose the folder that holds the weights")
    if len(found) > 1:
        raise ModelFileError(path, "one tensor file, or shards with an index", f"{len(found)} files",
                             "choose one of the files instead of the folder")
    return found


def open_tensors(path: Path, progress: Progress = no_progress) -> TensorFile:
    """Open the model at ``path``, a file or folder, with the JSON files of its folder."""
    files = tensor_files(path)
    folder = files[0].parent
    shards = _shards(folder) if os.path.isdir(path) else {}
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        part, metadata = _readers().get(file.suffix.lower(), read_safetensors)(file)
        if shards and part.keys() != shards[file.name]:
            raise ModelFileError(file, "the tensors that the index names", f"{len(part)} tensors, not the same ones",
                                 "download the whole folder again")
        tensors.update(part)
    return TensorFile(
        path=files[0] if len(files) == 1 else folder,
        tensors=tensors,
        metadata=metadata,
        config=read_json(folder / "config.json"),
        quantization=read_json(folder / "quantization_config.json"),
        progress=progress,
    )
