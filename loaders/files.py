"""Reading files from disk: safetensors (memory-mapped), pickles of tensors (never executed), JSON beside them.

A :class:`TensorFile` is what every format decodes. Nothing here knows what the tensors mean.
"""

import json
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import DOWNLOAD_AGAIN, ModelFileError, refusing

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_CHUNK, _PAGE = 1 << 20, 1 << 12
#: In the names of an adapter, of which training begins with whole factors of zeros.
_ADAPTER = re.compile(r"lora_|lokr_|hada_|\.diff$")


#: The files of a model, and what they were when it was read: size in bytes, time of modification in nanoseconds.
Stamps = dict[Path, tuple[int, int]]


def stamp(file: Path) -> tuple[int, int]:
    """What :data:`Stamps` remembers of ``file``. Raises OSError."""
    seen = file.stat()
    return seen.st_size, seen.st_mtime_ns


def refuse_changed(stamps: Stamps) -> None:
    """Raise ModelFileError for a file that is no longer the one whose tensors are mapped: they would be another
    model's, or gone."""
    for file, before in stamps.items():
        with refusing(file, "the file that was loaded", "load the model again", OSError):
            if stamp(file) != before:
                raise OSError("one that has changed since")


#: Called with (done, total) while something long goes on.
Progress = Callable[[int, int], None]


#: (path, mmap) -> tensors by name, metadata. With ``mmap`` tensors may stay on disk until they are touched.
Reader = Callable[[Path, bool], tuple[dict[str, Any], dict[str, str]]]


def no_progress(done: int, total: int) -> None:
    """A :data:`Progress` that does nothing."""


@dataclass
class TensorFile:
    """Tensors by name, as stored, with the file's own metadata and the JSON files of its folder.

    ``prefix``: what the names of a part of a checkpoint have before them in the file, see :func:`~.names.nested`.
    ``mapped``: the tensors are on disk until they are touched. ``warnings``: oddities that do not prevent reading.
    """

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    progress: Progress = no_progress
    mapped: bool = True
    stamps: Stamps = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    prefix: str = ""

    def sample(self) -> str:
        """What the tensors are like, for a sentence: one of their names."""
        return f"tensors such as {min(self.tensors)}" if self.tensors else "no tensors"

    def each(self, names: Iterable[str]) -> Iterator[str]:
        """The names in order, reporting progress."""
        names = list(names)
        for done, name in enumerate(names):
            self.progress(done, len(names))
            yield name
        self.progress(len(names), len(names))

    def take_pickle(self) -> dict[str, Any]:
        """The entries of a pickle, in memory, to be dropped one by one; :attr:`tensors` is empty afterwards.

        For formats that rearrange every byte; a mapped file would be in memory twice.
        """
        stored = read_pickle(self.path, mmap=False)[0] if self.mapped else self.tensors
        kept = {name: stored[name] for name in self.tensors}
        self.tensors.clear()
        return kept

    def warn(self, text: str) -> None:
        """Remember ``text``, once."""
        if text not in self.warnings:
            self.warnings.append(text)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``{}`` if there is no such file."""
    if not os.path.isfile(path):
        return {}
    refuse_stand_in(path)
    with refusing(path, "a JSON object", DOWNLOAD_AGAIN, ValueError, RecursionError, OSError):
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as the JSON files of the published folders are written."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def locate(folder: Path, name: str) -> Path:
    """``folder / name``; where there is no such file, one whose name another kind of system writes so: with other
    separators (a workflow made on Windows), or with accents put together in another way (macOS)."""
    slashed = name.replace("\\", "/")
    spellings = (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    return next((folder / each for each in spellings if os.path.exists(folder / each)), folder / name)


#: First bytes of files that stand in for the real one, what they are, and the remedy.
_STAND_INS = {
    b"version https://git-lfs": ("a git-lfs pointer, not the file itself", "run git lfs pull in {folder}"),
    b"<!doctype html": ("a web page, not the file itself", DOWNLOAD_AGAIN),
    b"<html": ("a web page, not the file itself", DOWNLOAD_AGAIN),
}


def refuse_stand_in(path: Path) -> None:
    """Raise ModelFileError for a git-lfs pointer, or a web page saved under the file's name."""
    with refusing(path, "a readable file", "check its permissions and its disk", OSError), path.open("rb") as file:
        start = file.read(32).lower()
    for signature, (found, action) in _STAND_INS.items():
        if start.startswith(signature):
            raise ModelFileError(path, "the contents of the file", found, action.format(folder=path.parent))


def refuse_unfinished(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelFileError where zeros run over an edge between two of ``tensors``, mapped from one file, or to its
    end: a download that reserved its space and did not finish. One tensor may be zero as a whole; two matrices in a
    row may not, but in an adapter. Reads two pages of each."""
    if any(map(_ADAPTER.search, tensors)):
        return
    zeros, begun, ended = 0, False, False  # whole matrices in a row; whether the last tensor begins and ends in zeros
    ordered = sorted(tensors.items(), key=lambda item: item[1].data_ptr())
    for name, tensor in [*ordered, ("the end", torch.zeros(1))]:
        data = tensor.detach().reshape(-1).view(torch.uint8)
        begins, ends = (not page.any() for page in (data[:_PAGE], data[-_PAGE:]))
        zeros = zeros + (tensor.ndim > 1) if begins and ends else 0
        if zeros > 1 or (ended and begins and not (begun and ends)):
            raise ModelFileError(path, "a finished download", f"zeros in the place of data before {name}",
                                 "resume the download, or download the file again")
        begun, ended = begins, ends


def read_safetensors(path: Path, mmap: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, memory-mapped or copied to memory, and the metadata of one safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise ModelFileError(path, "a whole safetensors file",
                             f"a damaged or truncated one, {error or 'unreadable'}") from error
    for name, tensor in tensors.items():
        check_stored(path, name, tensor)
    refuse_unfinished(path, tensors)
    return tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}, metadata


def read_pickle(path: Path, mmap: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """A pickled dict, through torch's restricted unpickler: nothing in the file can run. It has no metadata.

    With ``mmap`` the tensors stay on disk until touched; without, they are read, and freed as they are dropped, and
    their checksums are verified.
    """
    try:
        _check_archive(path, with_data=not mmap)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # on damaged or hostile bytes any: the parsers let their own escape
        raise ModelFileError(path, "a PyTorch file of plain tensors", f"one not safe to read, {_reason(error)}",
                             "download it again from its publisher, or use the MLX format") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ModelFileError(path, "a dict of tensors by name", f"a {type(value).__name__}", "choose another file")
    tensors = {f"{key}.{part}": item for key, entry in value.items()
               for part, item in (entry.items() if isinstance(entry, dict) else [("", entry)])
               if isinstance(item, torch.Tensor)}
    for name, item in tensors.items():
        check_stored(path, name, item)
    if mmap:  # otherwise the checksums have been verified
        refuse_unfinished(path, tensors)
    return value, {}


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
    """Raise ModelFileError for a tensor that no model holds: empty, sparse, or larger than what is on file."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    empty = not tensor.numel() and not name.endswith("scaled_fp8")  # ComfyUI's mark, which may be empty
    if not plain or empty or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ModelFileError(path, f"every number of {name} in the file",
                             f"an empty, sparse or partly stored tensor of shape {tuple(tensor.shape)}")
