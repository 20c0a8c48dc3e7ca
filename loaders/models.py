"""A diffusion model, text encoder or VAE from a file or folder in any known format."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import is_packed, parts
from . import formats, kinds
from .files import Progress, TensorFile, no_progress
from .klein import KleinConfig, check_klein
from .opening import open_tensors
from .qwen3 import Qwen3Config, check_qwen3, normalise
from .repository import find_repository, is_repository, source
from .vae import check_vae


@dataclass
class Transformer:
    """A diffusion model: canonical tensors in the file's own naming convention (see ``loaders/names.py``)."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    config: KleinConfig
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """See :func:`variant`."""
        return variant(self.tensors)

    @property
    def source(self) -> str:
        """Where the weights came from: what the file says, else what its path says."""
        return self.metadata.get("bonsai.source") or source(self.path)


@dataclass
class TextEncoder:
    """A Qwen3 text encoder: canonical tensors under Hugging Face names."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    config: Qwen3Config
    warnings: list[str] = field(default_factory=list)


@dataclass
class Vae:
    """A diffusers AutoencoderKLFlux2: its tensors and its ``config.json`` (empty without one)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def variant(tensors: dict[str, torch.Tensor], check_codes: bool = False) -> str:
    """The name for the commonest packing of its layers: ``ternary`` or ``binary`` where it is symmetric, else bits and
    form, such as ``2-bit affine``; ``dense`` without packed layers.

    A 2-bit code may be 3, which is not ternary. Such a model is called ``2-bit symmetric``, but only with
    ``check_codes``, which reads every code.
    """
    packed = [tensor for tensor in tensors.values() if is_packed(tensor)]
    if not packed:
        return "dense"
    (bits, form), _ = Counter((w.bits, w.form) for w in map(parts, packed)).most_common(1)[0]
    name = {(1, "symmetric"): "binary", (2, "symmetric"): "ternary"}.get((bits, form), f"{bits}-bit {form}")
    return f"{bits}-bit {form}" if name == "ternary" and check_codes and any(map(holds_code_3, packed)) else name


def holds_code_3(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a packed weight, symmetric and of 2 bits, with a code that is not ternary."""
    if not is_packed(tensor) or (parts(tensor).bits, parts(tensor).form) != (2, "symmetric"):
        return False
    codes = parts(tensor).codes
    return bool((codes & (codes >> 1) & 0x55).any())


def _open(path: Path | str, part: str, progress: Progress, mmap: bool) -> TensorFile:
    """Open ``path``, or the ``part`` of it if it is a repository, and check that it is that part."""
    if is_repository(path):
        path = find_repository(path).require(part)
    file = open_tensors(Path(path), progress, mmap)
    kinds.require(file, part)
    return file


def _log(file: TensorFile) -> list[str]:
    for warning in file.warnings:
        logging.warning("Bonsai Image: %s: %s.", file.path, warning)
    return file.warnings


def load_transformer(path: Path | str, progress: Progress = no_progress, mmap: bool = True) -> Transformer:
    """Load the diffusion model at ``path``: a file or folder in any known format, or a repository.

    Without ``mmap`` no tensor stays on disk. Raises ModelFileError.
    """
    file = _open(path, "transformer", progress, mmap)
    name, tensors = formats.decode(file)
    config = check_klein(file, tensors)
    return Transformer(file.path, name, tensors, config, file.metadata, _log(file))


def load_text_encoder(path: Path | str, progress: Progress = no_progress, mmap: bool = True) -> TextEncoder:
    """Load the text encoder at ``path`` (HQQ, MLX 4-bit or dense), as :func:`load_transformer` does."""
    file = _open(path, "text_encoder", progress, mmap)
    name, tensors = formats.decode(file)
    tensors = normalise(file.path, tensors)
    config = check_qwen3(file, tensors)
    return TextEncoder(file.path, name, tensors, config, _log(file))


def load_vae(path: Path | str, mmap: bool = True) -> Vae:
    """Load the diffusers AutoencoderKLFlux2 at ``path``, as :func:`load_transformer` does."""
    file = _open(path, "vae", no_progress, mmap)
    formats.refuse_other_than_tensors(file)
    tensors, config = check_vae(file)
    return Vae(file.path, tensors, config, _log(file))
