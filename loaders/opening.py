"""Which files a model consists of, and opening them: one file, or the shards that an index lists."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from . import files, formats
from .errors import DOWNLOAD_FOLDER, ModelFileError, refusing
from .files import Progress, Reader, TensorFile, no_progress, read_json

#: The names of weight files in published folders. The first of these that exists is the model; other files are ignored.
WELL_KNOWN = ("diffusion_pytorch_model.safetensors", "model.safetensors", "state_dict.pt", "qmodel.pt")


def _readers() -> dict[str, Reader]:
    """Suffix -> what reads a file of that name."""
    readers: dict[str, Reader] = dict.fromkeys(files.SAFETENSORS_SUFFIXES, files.read_safetensors)
    readers |= dict.fromkeys(files.PICKLE_SUFFIXES, files.read_pickle)
    return readers | {suffix: reader for known in formats.FORMATS for suffix, reader in known.readers.items()}


def _visible(folder: Path) -> Iterator[Path]:
    """What lies in ``folder``, sorted, without dotfiles: macOS puts ``._name`` beside each file that it copies to a
    foreign disk, and the Hub's client a ``.cache``. Raises ModelFileError."""
    with refusing(folder, "a readable folder", "check its permissions and its disk", OSError):
        yield from sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def files_in(folder: Path) -> list[Path]:
    """The tensor files that lie in ``folder`` itself, sorted; their suffixes may be in any case."""
    readers = _readers()
    return [child for child in _visible(folder) if child.suffix.lower() in readers and os.path.isfile(child)]


def folders_in(folder: Path) -> list[Path]:
    """The folders that lie in ``folder`` itself, sorted."""
    return [child for child in _visible(folder) if os.path.isdir(child)]


def fingerprint(path: Path, depth: int = 5) -> tuple:
    """Names, sizes and times of the file or of all files in the folder ``path``: others once one is replaced."""
    if os.path.isdir(path):
        return tuple(fingerprint(child, depth - 1) for child in _visible(path)) if depth else ()
    with contextlib.suppress(OSError):  # a link to nowhere
        return path.name, *files.stamp(path), path.stat().st_ctime_ns
    return (path.name,)


def _shards(folder: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the folder's index says it holds; ``{}`` without one. Raises ModelFileError."""
    index = next((child for child in _visible(folder) if child.name.endswith(".safetensors.index.json")), None)
    if index is None:
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(index, "a weight_map", "none")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(str(name), set()).add(tensor)
    for name in shards:
        inside = Path(name).name == name and name.endswith(files.SAFETENSORS_SUFFIXES)
        if not inside or not os.path.isfile(folder / name):
            raise ModelFileError(index, "the names of safetensors files beside it",
                                 f"{name!r}, which is not one", DOWNLOAD_FOLDER)
    return shards


def tensor_files(path: Path) -> dict[Path, set[str] | None]:
    """The tensor files of a model: ``path`` itself, the shards its folder's index names, or the folder's one file. A
    shard comes with the names of the tensors that it should hold. Raises ModelFileError."""
    # os.path.* returns False for an over-long or invalid name where Path.* raises.
    if os.path.isfile(path):
        return {path: None}
    if not os.path.isdir(path):
        raise ModelFileError(path, "a file or folder", "nothing there", "check the path")
    if shards := _shards(path):
        return {path / name: shards[name] for name in sorted(shards)}
    found = files_in(path)
    if not found:
        raise ModelFileError(path, "a tensor file such as .safetensors or .pt", "none",
                             "choose the folder that holds the weights")
    known = [path / name for name in WELL_KNOWN if path / name in found]
    if len(found) > 1 and not known:
        raise ModelFileError(path, "one tensor file, or shards with an index", f"{len(found)} files",
                             "choose one of the files instead of the folder")
    return {(known or found)[0]: None}


def open_tensors(path: Path, progress: Progress = no_progress, mmap: bool = True) -> TensorFile:
    """Open the model at ``path``, a file or folder, with the JSON files of its folder. Raises ModelFileError.

    With ``mmap`` the tensors stay on disk until they are touched; without, they are read to memory.
    """
    found = tensor_files(path)
    first = next(iter(found))
    folder = first.parent
    opened = TensorFile(first if len(found) == 1 else folder, {}, config=read_json(folder / "config.json"),
                        quantization=read_json(folder / "quantization_config.json"), progress=progress, mapped=mmap)
    for file, listed in found.items():
        files.refuse_stand_in(file)
        with refusing(file, "a readable file", "check its permissions and its disk", OSError, RuntimeError):
            opened.stamps[file] = files.stamp(file)
            part, opened.metadata = _readers().get(file.suffix.lower(), files.read_safetensors)(file, mmap)
        if listed and (odd := sorted(part.keys() ^ listed)):
            opened.warn(f"the index and {file.name} differ in {len(odd)} tensors, such as {odd[0]}")
        opened.tensors |= part
    return opened
