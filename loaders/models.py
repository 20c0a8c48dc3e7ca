"""A diffusion model, text encoder or VAE from a file or folder in any known format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import is_packed
from . import formats, klein, names, qwen3, vae
from .errors import ModelFileError
from .files import Progress, no_progress
from .opening import open_tensors
from .repository import source

_FAMILY_ACTION = "choose a file of PrismML's Bonsai Image 4B"


@dataclass
class Transformer:
    """A diffusion model: canonical tensors in the file's own naming convention (see ``loaders/names.py``)."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    config: klein.KleinConfig
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """``ternary``, ``binary``, or ``N-bit`` for the commonest bits of its packed layers; ``dense`` without any."""
        bits = Counter(tensor._params.bits for tensor in self.tensors.values() if is_packed(tensor))
        if not bits:
            return "dense"
        return {1: "binary", 2: "ternary"}.get(commonest := bits.most_common(1)[0][0], f"{commonest}-bit")

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
    config: qwen3.Qwen3Config


@dataclass
class Vae:
    """A diffusers AutoencoderKLFlux2: its tensors and its ``config.json`` (empty without one)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def load_transformer(path: Path | str, progress: Progress = no_progress) -> Transformer:
    """Load the diffusion model at ``path`` (a file or folder in any known format). Raises ModelFileError."""
    file = open_tensors(Path(path), progress)
    if not klein.is_klein(names.normalise(file.path, file.tensors)):
        raise ModelFileError(file.path, "the diffusion model of Bonsai Image (FLUX.2 Klein)",
                             f"tensors such as {next(iter(file.tensors), 'none')}", _FAMILY_ACTION)
    name, tensors = formats.decode(file)
    config = klein.check_klein(file.path, tensors, file.config)
    return Transformer(file.path, name, tensors, config, file.metadata)


def load_text_encoder(path: Path | str, progress: Progress = no_progress) -> TextEncoder:
    """Load the text encoder at ``path`` (HQQ, MLX 4-bit or dense; a file or folder). Raises ModelFileError."""
    file = open_tensors(Path(path), progress)
    if not qwen3.is_qwen3(file.tensors):
        raise ModelFileError(file.path, "the text encoder of Bonsai Image (Qwen3-4B)",
                             f"tensors such as {next(iter(file.tensors), 'none')}", "choose a text encoder file")
    name, tensors = formats.decode(file)
    tensors = qwen3.normalise(file.path, tensors)
    return TextEncoder(file.path, name, tensors, qwen3.check_qwen3(file.path, tensors, file.config))


def load_vae(path: Path | str) -> Vae:
    """Load the diffusers AutoencoderKLFlux2 at ``path`` (a file or folder). Raises ModelFileError."""
    file = open_tensors(Path(path))
    if not vae.is_vae(file.tensors):
        raise ModelFileError(file.path, "the VAE of FLUX.2 in diffusers' layout",
                             f"tensors such as {next(iter(file.tensors), 'none')}", "choose the vae folder of the pack")
    formats.refuse_other_than_tensors(file)
    vae.check_vae(file.path, file.tensors, file.config)
    return Vae(file.path, file.tensors, file.config)
