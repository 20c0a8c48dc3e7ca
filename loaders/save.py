"""Saving a diffusion model in any format, losslessly, verified before it counts as done.

What is written goes to a temporary name beside the target, is flushed to disk, loaded back and compared tensor by
tensor; only then it takes its name. An existing file is never touched.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..ops.packed import equal, is_packed
from . import formats
from .errors import ModelFileError, refusing
from .files import Progress, no_progress
from .formats.dense import expand
from .models import Transformer, load_transformer, variant
from .names import is_comfyui, to_comfyui, to_diffusers


def _verify(model: Transformer, keeps_codes: bool, path: Path, progress: Progress) -> None:
    """Raise ModelFileError unless ``path`` loads to exactly the weights of ``model``."""
    written = load_transformer(path, progress).tensors
    expected = to_comfyui(model.tensors) if is_comfyui(written) else to_diffusers(model.tensors)
    for name, tensor in expected.items():
        if not _same(tensor, written[name], keeps_codes):
            raise ModelFileError(model.path, f"{name} on disk as in memory", "a difference after writing",
                                 "check the disk")


def _same(one: torch.Tensor, other: torch.Tensor, keeps_codes: bool) -> bool:
    if is_packed(one) and is_packed(other):
        return equal(one, other) or (not keeps_codes and torch.equal(expand(one), expand(other)))
    return torch.equal(one, other)


def _flush(path: Path) -> None:
    """Bring what was written to disk, readable by whom the umask says (safetensors writes for the owner only)."""
    probe = path.with_name("probe")  # beside a "model" or "model.safetensors", see below
    probe.touch()
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        file.chmod(probe.stat().st_mode)
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def save_transformer(model: Transformer, path: Path, target: str, progress: Progress = no_progress) -> None:
    """Write ``model`` to ``path`` in the format ``target``, one of :func:`~.formats.targets`.

    ``progress`` follows the second half of the work, loading back what was written. Raises ModelFileError on an
    existing path, a name of the wrong kind, or a format that cannot hold the weights exactly.
    """
    writer = formats.writer(target, path)
    if writer.suffixes and path.suffix not in writer.suffixes:
        raise ModelFileError(path, f"a file name ending in {writer.suffixes[0]}", f"{path.name!r}", "add the ending")
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bonsai-image-") as scratch:
        written = Path(scratch) / f"model{path.suffix if writer.suffixes else ''}"
        with (refusing(path, "a disk that takes the file", "free some space or choose another folder", OSError,
                       RuntimeError, SafetensorError),
              refusing(model.path, f"weights that the {target} format holds exactly", "choose another format",
                       ValueError)):
            about = formats.About(variant(model.tensors, check_codes=True), model.source)
            writer.write(written, model.tensors, model.config, about)
            _flush(written)
        _verify(model, writer.keeps_codes, written, progress)
        # The target may have been created meanwhile.
        _refuse_existing(path)
        written.rename(path)


def _refuse_existing(path: Path) -> None:
    # A link to a disk that is not there exists, too.
    if os.path.lexists(path):
        raise ModelFileError(path, "a path that is free", "an existing file or folder", "choose another name")
