"""Reading tensor files from disk: safetensors (memory-mapped), pickles of tensors (never executed), JSON beside them.

A :class:`TensorFile` is what every format module decodes. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .errors import DOWNLOAD_AGAIN, ModelFileError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
TENSOR_SUFFIXES = SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES

#: What ``torch.load(weights_only=True)`` and ``zipfile`` raise on damaged or hostile bytes: they pass on whatever they
#: stumble over.
_UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError,
                      AttributeError, AssertionError, OverflowError, MemoryError, ImportError, struct.error, OSError,
                      zipfile.BadZipFile, zlib.error)
_CHUNK = 1 << 20


#: Called with (done, total) while something long goes on.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """The :data:`Progress` of whoever does not care."""


@dataclass
class TensorFile:
    """Tensors by name, as stored, with the file's own metadata and the JSON files of its folder."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    progress: Progress = no_progress

    def each(self, names: Iterable[str]) -> Iterator[str]:
        """The names in order, reporting progress."""
        names = list(names)
        for done, name in enumerate(names):
            self.progress(done, len(names))
            yield name
        self.progress(len(names), len(names))

    def stated_packing(self) -> tuple[Any, Any]:
        """(bits, group size) as the JSON files state them; None where they are silent."""
        for conf in (self.quantization, self.config.get("quantization"), self.config.get("quantization_config")):
            if isinstance(conf, dict) and ("bits" in conf or "group_size" in conf):
                return conf.get("bits"), conf.get("group_size")
        return None, None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``{}`` if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelFileError(path, "a JSON object", f"unreadable text ({type(error).__name__})",
                             DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "a JSON object", f"a {type(value).__name__}", DOWNLOAD_AGAIN)
    return value


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Memory-mapped tensors and the metadata of one safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise ModelFileError(path, "a whole safetensors file", f"a damaged or truncated one, {error or 'unreadable'}",
                             DOWNLOAD_AGAIN) from error
    for name, tensor in tensors.items():
        check_stored(path, name, tensor)
    return tensors, metadata


def read_pickle(path: Path, mmap: bool) -> dict[str, Any]:
    """A pickled dict, through torch's restricted unpickler: nothing in the file can run.

    With ``mmap`` the tensors stay on disk until touched; without, they are read, and freed as they are dropped, and
    their checksums are verified.
    """
    try:
        _check_archive(path, with_data=not mmap)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _UNPICKLING_ERRORS as error:
        raise ModelFileError(path, "a PyTorch file of plain tensors", f"one not safe to read, {_reason(error)}",
                             "download it again from its publisher, or use the MLX pack") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ModelFileError(path, "a dict of tensors by name", f"a {type(value).__name__}", "choose another file")
    for name, item in value.items():
        if isinstance(item, torch.Tensor):
            check_stored(path, name, item)
    return value


def _check_archive(path: Path, with_data: bool) -> None:
    """Raise BadZipFile unless ``path`` is a sound zip as ``torch.save`` writes it.

    torch verifies no checksum and matches no header, so a flipped bit would swap or shift tensors unnoticed; and it
    inflates compressed records, which it never writes, without a limit.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename} is compressed")
            with archive.open(record) as stream:
                while (with_data or "/data/" not in record.filename) and stream.read(_CHUNK):
                    pass


def _reason(error: Exception) -> str:
    """What ``torch.load`` stumbled over, without its advice, which is to open the file with the restrictions off."""
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"for it refers to {named[1]}"
    return "for it holds more than tensors" if "weights_only" in text else text or type(error).__name__


def check_stored(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise ModelFileError for a tensor that no pack holds: empty, sparse, or larger than what is on file."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or not tensor.numel() or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ModelFileError(path, f"every number of {name} in the file",
                             f"an empty, sparse or partly stored tensor of shape {tuple(tensor.shape)}", DOWNLOAD_AGAIN)


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
    """The tensor files that lie in ``folder`` itself, sorted; their endings may be in letters of any case."""
    return sorted(child for child in folder.iterdir() if child.suffix.lower() in TENSOR_SUFFIXES and child.is_file())


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
        if file.suffix.lower() in PICKLE_SUFFIXES:
            tensors.update(read_pickle(file, mmap=True))
            continue
        part, metadata = read_safetensors(file)
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
