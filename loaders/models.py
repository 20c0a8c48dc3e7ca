"""A diffusion model, text encoder or VAE from a file or folder in any known format, and a diffusion model to one.

Saving is lossless, and verified before it counts as done: what is written goes to a temporary name beside the target,
is flushed to disk, loaded back and compared tensor by tensor; only then does it take its name. An existing file is
never touched.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError

from .. import disk
from ..ops.packed import equal, is_packed
from . import formats
from .description import variant
from .errors import CHOOSE_UNMODIFIED, DOWNLOAD_AGAIN, ModelFileError, refusing
from .files import Progress, Stamps, TensorFile, no_progress
from .formats.dense import expand
from .formats.interface import About
from .klein import KleinConfig, check_klein, is_comfyui
from .names import nested, to_comfyui, to_diffusers
from .names import normalise as normalise_names
from .opening import open_tensors
from .qwen3 import Qwen3Config, check_qwen3, is_read, normalise
from .repository import find_repository, is_repository, require_part, source
from .vae import check_vae

Config = TypeVar("Config")


@dataclass
class Model(Generic[Config]):
    """A model: canonical tensors in the file's own naming convention (see ``loaders/names.py``)."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    config: Config
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stamps: Stamps = field(default_factory=dict)


class Transformer(Model[KleinConfig]):
    """A diffusion model."""

    @property
    def variant(self) -> str:
        """See :func:`variant`."""
        return variant(self.tensors)

    @property
    def source(self) -> str:
        """Where the weights came from: what the file says, else what its path says."""
        return self.metadata.get("bonsai.source") or source(self.path)


class TextEncoder(Model[Qwen3Config]):
    """A Qwen3 text encoder, under Hugging Face names."""


class Vae(Model[dict[str, Any]]):
    """A diffusers AutoencoderKLFlux2, in diffusers' format. Its config is its ``config.json`` (empty without one)."""


def _open(path: Path | str, part: str, progress: Progress, mmap: bool) -> TensorFile:
    """Open ``path``, or the ``part`` of it if it is a repository, and check that it is that part."""
    if is_repository(path):
        path = find_repository(path).require(part)
    file = open_tensors(Path(path), progress, mmap)
    file.prefix, tensors = nested(file.tensors, part)
    if file.prefix and (twice := sorted(tensors.keys() & file.tensors.keys())):
        raise ModelFileError(file.path, "each tensor once", f"{twice[0]} with and without {file.prefix}",
                             CHOOSE_UNMODIFIED)
    file.tensors = tensors
    require_part(file, part)
    return file


def _log(file: TensorFile) -> list[str]:
    for warning in file.warnings:
        logging.warning("Bonsai Image: %s: %s.", file.path, warning)
    return file.warnings


def load_transformer(path: Path | str, progress: Progress = no_progress, mmap: bool = True,
                     dense: bool = False) -> Transformer:
    """Load the diffusion model at ``path``: a file or folder in any known format, or a repository.

    Without ``mmap`` no tensor stays on disk. ``dense``: any FLUX.2 Klein in floating point, as it is; otherwise one
    in floating point has to have weights that can be packed. Raises ModelFileError.
    """
    file = _open(path, "transformer", progress, mmap)
    if dense:
        formats.refuse_other_than_tensors(file)
        name, tensors = "dense", normalise_names(file.path, file.tensors)
    else:
        name, tensors = formats.decode(file)
    return Transformer(file.path, name, tensors, check_klein(file, tensors), file.metadata, _log(file), file.stamps)


def load_text_encoder(path: Path | str, progress: Progress = no_progress, mmap: bool = True,
                      whole: bool = True) -> TextEncoder:
    """Load the text encoder at ``path`` (HQQ, MLX 4-bit or dense), as :func:`load_transformer` does.

    Not ``whole``: without the layers that FLUX.2 Klein never reads, a quarter of Qwen3-4B, and without the final norm.
    """
    file = _open(path, "text_encoder", progress, mmap)
    # A file may have been saved without them.
    whole = whole and not all(map(is_read, file.tensors))
    if not whole:
        file.tensors = {name: tensor for name, tensor in file.tensors.items() if is_read(name)}
    name, tensors = formats.decode(file)
    tensors = normalise(file.path, tensors)
    config = check_qwen3(file, tensors, whole)
    return TextEncoder(file.path, name, tensors, config, file.metadata, _log(file), file.stamps)


def load_vae(path: Path | str, mmap: bool = True) -> Vae:
    """Load the diffusers AutoencoderKLFlux2 at ``path``, as :func:`load_transformer` does."""
    file = _open(path, "vae", no_progress, mmap)
    formats.refuse_other_than_tensors(file)
    with refusing(file.path, "JSON in the metadata bonsai.vae", DOWNLOAD_AGAIN, ValueError, RecursionError):
        stored = json.loads(file.metadata.get("bonsai.vae", "{}"))
    file.config |= stored if isinstance(stored, dict) else {}
    tensors, config = check_vae(file)
    return Vae(file.path, "diffusers", tensors, config, file.metadata, _log(file), file.stamps)


#: Part of a repository -> what loads it.
LOADERS: Mapping[str, Callable[..., Model]] = {
    "transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_vae}


def difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor],
               keeps_codes: bool = True) -> str | None:
    """The first of the ``expected`` tensors that has another value, or other codes, among those ``found``; or None."""
    for name, tensor in expected.items():
        other = found[name]
        same = equal(tensor, other) if is_packed(tensor) and is_packed(other) else torch.equal(tensor, other)
        if not same and (keeps_codes or not torch.equal(expand(tensor), expand(other))):
            return name
    return None


def _flush(path: Path) -> None:
    """Bring what was written to disk, readable by whom the umask says (safetensors writes for the owner only)."""
    probe = path.with_name("probe")  # beside a "model" or "model.safetensors", see below
    probe.touch()
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with disk.optional():
            file.chmod(probe.stat().st_mode)
        disk.flush_path(file)


def save_transformer(model: Transformer, path: Path, target: str, progress: Progress = no_progress) -> None:
    """Write ``model`` to ``path`` in the format ``target``, one of :func:`~.formats.targets`.

    ``progress`` follows the second half of the work, loading back what was written. Raises ModelFileError on an
    existing path, a name of the wrong kind, a format that cannot hold the weights exactly, or a disk that fails.
    """
    writer = formats.writer(target, path)

    def write(written: Path) -> None:
        about = About(variant(model.tensors, check_codes=True), model.source)
        writer.write(written, model.tensors, model.config, about)

    def verify(written: Path) -> str | None:
        found = load_transformer(written, progress).tensors
        expected = to_comfyui(model.tensors) if is_comfyui(found) else to_diffusers(model.tensors)
        return difference(expected, found, writer.keeps_codes)

    save(model.path, path, target, writer.suffixes, write, verify)


def save(source: Path, path: Path, target: str, suffixes: Sequence[str], write: Callable[[Path], None],
         verify: Callable[[Path], str | None]) -> None:
    """Have ``write`` make a file ending in one of ``suffixes``, or without them a folder, which takes the name ``path``
    once ``verify`` has found no difference (see :func:`difference`) to ``source``. Raises ModelFileError."""
    if suffixes and path.suffix not in suffixes:
        raise ModelFileError(path, f"a file name ending in {suffixes[0]}", f"{path.name!r}", "add the ending")
    try:
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=".bonsai-image-"))
        try:
            written = scratch / f"model{path.suffix if suffixes else ''}"
            write(written)
            _flush(written)
            if different := verify(written):
                raise ModelFileError(source, f"{different} on disk as in memory", "a difference after writing",
                                     "check the disk")
            # The target may have been created meanwhile.
            refuse_existing(path)
            disk.patiently(written.rename, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # on Windows, what an error keeps mapped cannot be deleted
        disk.flush_path(path.parent)
    except ValueError as error:
        raise ModelFileError(source, f"weights that the {target} format holds exactly", str(error),
                             "choose another format") from error
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        raise ModelFileError(path, "a whole file written there", disk.reason(error),
                             f"{disk.advice(error)} and save again, for nothing was written") from error


def refuse_existing(path: Path) -> None:
    """Raise ModelFileError if there is anything at ``path``."""
    # A link to a disk that is not there exists, too.
    if os.path.lexists(path):
        raise ModelFileError(path, "a path that is free", "an existing file or folder", "choose another name")
