"""The GGUF container of ggml: a header, and tensors as rows of blocks.

The header holds metadata, then name, shape, type and offset of every tensor; the tensor data follow, aligned. All of it
is checked before a byte of a tensor is touched: no unchecked header field sizes a read or an allocation.
(The ``gguf`` package, 0.19, lacks half of our types, and follows an array of any length past the end of the file.)

Source: ``gguf.h`` and ``ggml-common.h`` of ggml; those of PrismML's fork of llama.cpp for PQ2_0 and PTQ1_0.
"""

import itertools
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from .errors import DOWNLOAD_AGAIN, ModelFileError
from .files import refuse_unfinished


class Type(NamedTuple):
    """A ggml type: a row is stored in blocks of ``weights`` elements and ``size`` bytes.

    Blocks are uint8 here; of a packed type, with ``bits`` above 0, an FP16 scale and canonical codes, but in PTQ1_0.
    """

    id: int
    name: str
    weights: int
    size: int
    dtype: torch.dtype = torch.uint8
    bits: int = 0


F32 = Type(0, "F32", 1, 4, torch.float32)
F16 = Type(1, "F16", 1, 2, torch.float16)
BF16 = Type(30, "BF16", 1, 2, torch.bfloat16)
Q8_0 = Type(8, "Q8_0", 32, 34)
Q1_0 = Type(41, "Q1_0", 128, 18, bits=1)
Q2_0 = Type(42, "Q2_0", 64, 18, bits=2)
PQ2_0 = Type(142, "PQ2_0", 128, 34, bits=2)
PTQ1_0 = Type(143, "PTQ1_0", 128, 28, bits=2)
_TYPES = {kind.id: kind for kind in (F32, F16, BF16, Q8_0, Q1_0, Q2_0, PQ2_0, PTQ1_0)}
#: Other types in which FLUX.2 Klein is passed on, for the message that refuses them.
_REFUSED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
            34: "TQ1_0", 35: "TQ2_0"}

#: What to do with a file that does not hold Bonsai's weights exactly; the second of a type that others load.
DOWNLOAD = "download Green-Sky/bonsai-image-binary-4B-GGUF or prism-ml/bonsai-image-ternary-4B-mlx-2bit instead"
INSTEAD = f"load it with Unet Loader (GGUF) of city96/ComfyUI-GGUF, or {DOWNLOAD}"

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
#: Bytes of the longest header that is read. Klein's has 10 kB, one with a language model's vocabulary a few MB.
_LONGEST_HEADER = 1 << 24
_MOST_DIMENSIONS = 4
#: The scalar metadata types by number, as codes of ``struct``.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9


class Entry(NamedTuple):
    """A tensor in the header; ``offset`` counts from the start of the tensor data."""

    type: Type
    shape: tuple[int, ...]
    offset: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.type.weights * self.type.size

    @property
    def size(self) -> int:
        return math.prod(self.shape[:-1]) * self.row


class Contents(NamedTuple):
    """A checked header; ``start`` is where the tensor data begin."""
    entries: dict[str, Entry]
    metadata: dict[str, Any]
    start: int


class _Cursor:
    """A position in the header. Raises ValueError, KeyError or struct.error for what no sound file has there."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        value, = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def skip(self, size: int) -> int:
        """Start of the next ``size`` bytes."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"{size} bytes after byte {start} of {len(self.data)}")
        return start

    def text(self) -> str:
        start = self.skip(self.take("Q"))
        return self.data[start : self.at].decode("utf-8")

    def value(self) -> Any:
        """A metadata value; None for an array, which nothing here needs."""
        kind = self.take("I")
        if kind != _ARRAY:
            return self.text() if kind == _STRING else self.take(_SCALARS[kind])
        kind, length = self.take("I"), self.take("Q")
        if kind != _STRING:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
            return None
        for _ in range(length):
            self.text()
        return None


def _entry(path: Path, name: str, header: _Cursor, alignment: int) -> Entry:
    dimensions = header.take("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions of {name}")
    shape = tuple(header.take("Q") for _ in range(dimensions))[::-1]
    number, offset = header.take("I"), header.take("Q")
    if number not in _TYPES:
        stored = _REFUSED.get(number, f"ggml type {number}")
        why = ("shares one scale among 256 weights" if stored.startswith("TQ") else
               "rounds them" if number in _REFUSED else "is not read here")
        raise ModelFileError(path, "Q1_0, Q2_0, PQ2_0 or PTQ1_0, which hold Bonsai's weights exactly",
                             f"{name} in {stored}, which {why}", INSTEAD)
    kind = _TYPES[number]
    if not all(shape) or shape[-1] % kind.weights or offset % alignment:
        raise ValueError(f"{name} of shape {shape} in blocks of {kind.weights} at offset {offset}")
    return Entry(kind, shape, offset)


def _parse(path: Path, header: _Cursor) -> Contents:
    if header.data[: header.skip(len(_MAGIC)) + len(_MAGIC)] != _MAGIC or header.take("I") not in _VERSIONS:
        raise ValueError("another magic number or version")
    count, keys = header.take("Q"), header.take("Q")
    metadata = {}
    for _ in range(keys):
        key = header.text()
        metadata[key] = header.value()
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}")
    entries: dict[str, Entry] = {}
    for key in filter(re.compile(r"prism\.|.*hadamard").match, metadata):
        raise ModelFileError(path, "weights as they are multiplied", f"rotated ones, as its key {key} says", DOWNLOAD)
    for _ in range(count):
        name = header.text()
        if name in entries:
            raise ValueError(f"{name} twice")
        if name.startswith(("blk.", "token_embd.", "output")):
            raise ModelFileError(path, "the diffusion model of Bonsai Image", f"a language model's {name}",
                                 "load it with CLIPLoader (GGUF) of city96/ComfyUI-GGUF, type flux2")
        entries[name] = _entry(path, name, header, alignment)
    return Contents(entries, metadata, header.at + -header.at % alignment)


def read_header(path: Path) -> Contents:
    """The header of a file whose tensors all lie inside it, apart from each other. Raises ModelFileError."""
    total = path.stat().st_size
    with path.open("rb") as file:
        header = _Cursor(file.read(min(total, _LONGEST_HEADER)))
    try:
        contents = _parse(path, header)
    except (ValueError, KeyError, struct.error) as error:
        raise ModelFileError(path, "a whole little-endian GGUF file of version 2 or 3",
                             f"a damaged or truncated one ({error})", DOWNLOAD_AGAIN) from error
    contents = contents._replace(entries=_regrouped(contents, total))
    end = 0
    for name, entry in sorted(contents.entries.items(), key=lambda item: item[1].offset):
        position = contents.start + entry.offset
        if entry.offset < end or position + entry.size > total:
            raise ModelFileError(path, f"the {entry.size} bytes of {name} inside the file and apart from other tensors",
                                 f"them at byte {position} of {total}", DOWNLOAD_AGAIN)
        end = entry.offset + entry.size
    return contents


def _regrouped(contents: Contents, total: int) -> dict[str, Entry]:
    """The entries of a file of ``total`` bytes, those of type 42 as PQ2_0 where its blocks fill the room up to the next
    tensor: PrismML's files had that number for groups of 128 before ggml gave it to groups of 64."""
    offsets = sorted(entry.offset for entry in contents.entries.values())
    end = dict(itertools.pairwise([*offsets, total - contents.start]))
    older = {name: entry._replace(type=PQ2_0) for name, entry in contents.entries.items() if entry.type is Q2_0}
    alignment = contents.metadata.get("general.alignment", _ALIGNMENT)
    fits = all(0 <= end[entry.offset] - entry.offset - entry.size < alignment for entry in older.values())
    return contents.entries | older if fits else contents.entries


def read(path: Path, mmap: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, mapped or in memory, its texts. Tensors in blocks are uint8: the bytes of a row last."""
    contents = read_header(path)
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[contents.start :]
    data = data if mmap else data.clone()
    tensors = {name: data[entry.offset :][: entry.size].view(*entry.shape[:-1], entry.row).view(entry.type.dtype)
               for name, entry in contents.entries.items()}
    refuse_unfinished(path, tensors)
    return tensors, {key: value for key, value in contents.metadata.items() if isinstance(value, str)}


def layout(tensors: Mapping[str, tuple[Type, tuple[int, ...]]]) -> dict[str, Entry]:
    """Entries, one tensor after the other, for types and shapes by name."""
    entries, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        entries[name] = Entry(kind, shape, offset)
        offset += entries[name].size + -entries[name].size % _ALIGNMENT
    return entries


def write(path: Path, entries: Mapping[str, Entry], data: Iterable[torch.Tensor],
          metadata: Mapping[str, str | int]) -> None:
    """Write a file of ``entries`` (see :func:`layout`), whose bytes ``data`` yields one tensor at a time."""
    with path.open("wb") as file:
        _write_aligned(file, b"".join(_header(entries, metadata)))
        for tensor in data:
            _write_aligned(file, tensor.contiguous().view(torch.uint8).numpy())


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str | int]) -> Iterator[bytes]:
    yield _MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(entries), len(metadata))
    for key, value in metadata.items():
        yield _text(key)
        yield (struct.pack("<II", _UINT32, value) if isinstance(value, int)
               else struct.pack("<I", _STRING) + _text(value))
    for name, entry in entries.items():
        shape = entry.shape[::-1]
        yield _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.type.id, entry.offset)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _write_aligned(file: BinaryIO, data: Any) -> None:
    file.write(data)
    file.write(bytes(-file.tell() % _ALIGNMENT))
