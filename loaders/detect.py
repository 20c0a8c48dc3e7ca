"""Which format a path holds, by content; and loading it, whatever it is, into one canonical state dict."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..ops.packed import is_packed
from . import bonsai, dense, gemlite, hqq, klein, mlx, names, qwen3, vae
from .errors import DOWNLOAD_AGAIN, ModelFileError
from .files import Progress, TensorFile, files_in, no_progress, open_tensors, read_json

#: Every format that can be read, in the order they are tried. A format is a module with NAME, matches and decode.
FORMATS = (gemlite, mlx, bonsai, hqq, dense)

#: File names that say nothing, used inside the folders of a repository.
_GENERIC_STEMS = ("diffusion_pytorch_model", "state_dict", "model")

#: Where ``bonsai-image download`` notes what it fetched, in the repository's folder.
_RECORD = "bonsai-download.json"

#: Files of which a tokenizer needs one of these sets.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

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
        """Where the weights came from: what the file says, else the Hub repository and revision in its path, else
        the name of the repository folder (for the generic file names of a pack) or of the file."""
        if "bonsai.source" in self.metadata:
            return self.metadata["bonsai.source"]
        path = self.path.absolute()
        for folder in path.parents[:2]:
            # A damaged note is no reason to refuse a model.
            with contextlib.suppress(ModelFileError, KeyError):
                record = read_json(folder / _RECORD)
                return f"{record['repository']}@{record['commit']}"
        parts = path.parts
        for part, marker, revision in zip(parts, parts[1:], parts[2:], strict=False):
            if part.startswith("models--") and marker == "snapshots":
                return f"{part.removeprefix('models--').replace('--', '/')}@{revision}"
        return path.parent.parent.name if path.stem in _GENERIC_STEMS else path.stem


@dataclass
class TextEncoder:
    """A Qwen3 text encoder: canonical tensors under Hugging Face names."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    config: qwen3.Qwen3Config


@dataclass
class Repository:
    """The parts of a downloaded repository; a path is None where the folder has no such part."""

    path: Path
    transformer: Path
    text_encoder: Path | None
    vae: Path | None
    tokenizer: Path | None
    scheduler: Path | None


def detect(file: TensorFile):
    """The format module that reads ``file``. Raises ModelFileError if none does."""
    for module in FORMATS:
        if module.matches(file):
            return module
    name, value = next(iter(file.tensors.items()), ("no tensors", None))
    kind = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
    raise ModelFileError(file.path, "a Bonsai Image model (GemLite, MLX, unpacked or our own format)",
                         f"tensors such as {name} ({kind})", _FAMILY_ACTION)


def _decode(file: TensorFile) -> tuple[str, dict[str, torch.Tensor]]:
    """Format name and canonical tensors of ``file``. Raises ModelFileError."""
    module = detect(file)
    if module is not hqq:
        _refuse_other_than_tensors(file)
    try:
        return module.NAME, module.decode(file)
    except ValueError as error:
        raise ModelFileError(file.path, f"a consistent {module.NAME} pack", str(error), DOWNLOAD_AGAIN) from error


def _refuse_other_than_tensors(file: TensorFile) -> None:
    """Raise ModelFileError if a pickle holds anything else; only HQQ's does."""
    for name, value in file.tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ModelFileError(file.path, f"{name} to be a tensor", f"a {type(value).__name__}", DOWNLOAD_AGAIN)


def load_transformer(path: Path | str, progress: Progress = no_progress) -> Transformer:
    """Load the diffusion model at ``path`` (a file or folder in any known format). Raises ModelFileError."""
    file = open_tensors(Path(path), progress)
    if not klein.is_klein(names.normalise(file.path, file.tensors)):
        raise ModelFileError(file.path, "the diffusion model of Bonsai Image (FLUX.2 Klein)",
                             f"tensors such as {next(iter(file.tensors), 'none')}", _FAMILY_ACTION)
    name, tensors = _decode(file)
    config = klein.check_klein(file.path, tensors, file.config)
    return Transformer(file.path, name, tensors, config, file.metadata)


def load_text_encoder(path: Path | str, progress: Progress = no_progress) -> TextEncoder:
    """Load the text encoder at ``path`` (HQQ, MLX 4-bit or dense; a file or folder). Raises ModelFileError."""
    file = open_tensors(Path(path), progress)
    if not qwen3.is_qwen3(file.tensors):
        raise ModelFileError(file.path, "the text encoder of Bonsai Image (Qwen3-4B)",
                             f"tensors such as {next(iter(file.tensors), 'none')}", "choose a text encoder file")
    name, tensors = _decode(file)
    tensors = qwen3.normalise(file.path, tensors)
    return TextEncoder(file.path, name, tensors, qwen3.check_qwen3(file.path, tensors, file.config))


def load_vae(path: Path | str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and config of the diffusers AutoencoderKLFlux2 at ``path`` (a file or folder). Raises ModelFileError."""
    file = open_tensors(Path(path))
    if not vae.is_vae(file.tensors):
        raise ModelFileError(file.path, "the VAE of FLUX.2 in diffusers' layout",
                             f"tensors such as {next(iter(file.tensors), 'none')}", "choose the vae folder of the pack")
    _refuse_other_than_tensors(file)
    vae.check_vae(file.path, file.tensors, file.config)
    return file.tensors, file.config


def is_repository(path: Path | str) -> bool:
    """Whether ``path`` can only be a repository, not a model: a folder without tensor files of its own."""
    return os.path.isdir(path) and not files_in(Path(path))


def find_repository(path: Path | str) -> Repository:
    """Find the parts of a downloaded repository by what its folders contain.

    Raises ModelFileError without a transformer.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise ModelFileError(path, "the folder of a downloaded Bonsai Image repository", "no such folder",
                             "download the whole repository, not one file of it")
    parts: dict[str, Path] = {}
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        if (folder / "scheduler_config.json").is_file():
            parts.setdefault("scheduler", folder)
        for candidate in (folder, folder / "tokenizer"):
            # Without its vocabulary a tokenizer still loads, and turns every prompt into nothing.
            if any(all((candidate / name).is_file() for name in names) for names in _VOCABULARIES):
                parts.setdefault("tokenizer", candidate)
        if not files_in(folder):
            continue
        file = open_tensors(folder)
        if qwen3.is_qwen3(file.tensors):
            parts.setdefault("text_encoder", folder)
        elif vae.is_vae(file.tensors):
            parts.setdefault("vae", folder)
        elif klein.is_klein(file.tensors):
            parts.setdefault("transformer", folder)
    if "transformer" not in parts:
        class_name = read_json(path / "model_index.json").get("_class_name", "no diffusion model")
        raise ModelFileError(path, "a folder with the diffusion model of Bonsai Image", str(class_name),
                             "download the whole repository again")
    return Repository(path, parts["transformer"], *(parts.get(part) for part in
                      ("text_encoder", "vae", "tokenizer", "scheduler")))
