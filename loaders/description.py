"""What a model is made of, counted; and which published file it is."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .. import published
from ..ops.packed import is_packed, packed_nbytes, unwrap
from .files import Progress
from .repository import source

_CHUNK = 1 << 22


def variant(tensors: dict[str, torch.Tensor], check_codes: bool = False) -> str:
    """The name for the commonest packing of its layers: ``ternary`` or ``binary`` where it is symmetric, else bits and
    form, such as ``2-bit affine``; ``dense`` without packed layers.

    A 2-bit code may be 3, which is not ternary. Such a model is called ``2-bit symmetric``, but only with
    ``check_codes``, which reads every code.
    """
    packed = [tensor for tensor in tensors.values() if is_packed(tensor)]
    if not packed:
        return "dense"
    (bits, form), _ = Counter((w.bits, w.form) for w in map(unwrap, packed)).most_common(1)[0]
    name = {(1, "symmetric"): "binary", (2, "symmetric"): "ternary"}.get((bits, form), f"{bits}-bit {form}")
    return f"{bits}-bit {form}" if name == "ternary" and check_codes and any(map(holds_code_3, packed)) else name


def holds_code_3(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a packed weight, symmetric and of 2 bits, with a code that is not ternary."""
    if not is_packed(tensor) or (unwrap(tensor).bits, unwrap(tensor).form) != (2, "symmetric"):
        return False
    codes = unwrap(tensor).codes
    return bool((codes & (codes >> 1) & 0x55).any())


class Counts(NamedTuple):
    """Packed layers and dense tensors of one model. ``packing``: (bits, group, form, scale dtype) -> layers."""

    packed_layers: int
    packed_weights: int
    packed_bytes: int
    dense_tensors: int
    dense_bytes: int
    dense_dtypes: list[str]
    packing: dict[tuple[int, int, str, str], int]


def count(tensors: Mapping[str, torch.Tensor]) -> Counts:
    """Count ``tensors``."""
    packed = [tensor for tensor in tensors.values() if is_packed(tensor)]
    dense = [tensor for tensor in tensors.values() if not is_packed(tensor)]
    packing = Counter((w.bits, w.group, w.form, _name(w.scale.dtype)) for w in map(unwrap, packed))
    return Counts(len(packed), sum(tensor.numel() for tensor in packed), sum(map(packed_nbytes, packed)), len(dense),
                  sum(tensor.nbytes for tensor in dense), sorted({_name(tensor.dtype) for tensor in dense}),
                  dict(sorted(packing.items())))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def publication(path: Path, sha256: str | None = None) -> str | None:
    """Which published file the one at ``path`` is, or how it differs from the one that should lie there; None if it
    resembles none. ``sha256`` is that of the file, if it was computed."""
    size, place = path.stat().st_size, source(path).split("@")[0].split("/")[-1]
    same = [(repository, file) for repository, file in published.weight_files() if file.size == size]
    here = [(repository, file) for repository, file in same if repository.id.endswith(f"/{place}")] or same
    if here:
        where = " and of ".join(f"{repository.id}, revision {(repository.commit or 'unknown')[:10]}"
                                for repository, _ in here)
        known = here[0][1].sha256  # the same in all
        if sha256 is None:
            return f"as long as the published file of {where}; its hash was not compared"
        if known is None:
            return f"as long as the published file of {where}, whose hash is not known here"
        return f"published file of {where}" if sha256 == known else (
            f"not the published file of {where}, though as long: SHA-256 {sha256[:10]}, not {known[:10]}")
    name = f"{path.parent.name}/{path.name}"
    return next((f"not the published file: {size:,} bytes, not {file.size:,}"
                 for repository, file in published.weight_files()
                 if repository.id.endswith(f"/{place}") and file.path == name), None)


def sha256(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file; ``progress`` counts its bytes."""
    state, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
            done += len(chunk)
            progress(done, size)
    return state.hexdigest()
