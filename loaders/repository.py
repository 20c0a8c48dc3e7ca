"""A downloaded repository: the parts it consists of, and where its weights came from."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from . import klein, qwen3, vae
from .errors import ModelFileError
from .files import read_json
from .opening import files_in, open_tensors

#: Where ``bonsai-image download`` records what it fetched, in the repository's folder.
RECORD = "bonsai-download.json"

#: Generic file stems of the folders of a repository.
_GENERIC_STEMS = ("diffusion_pytorch_model", "state_dict", "model")

#: Files of which a tokenizer needs one of these sets.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass
class Repository:
    """The parts of a downloaded repository; a path is None where the folder has no such part."""

    path: Path
    transformer: Path
    text_encoder: Path | None
    vae: Path | None
    tokenizer: Path | None
    scheduler: Path | None

    def require(self, *parts: str) -> None:
        """Raise ModelFileError for the first of ``parts`` (names of fields) that the folder lacks."""
        for part in parts:
            if getattr(self, part) is None:
                raise ModelFileError(self.path, f"a folder with the {part.replace('_', ' ')}", "none",
                                     "download the whole repository again")


def source(path: Path) -> str:
    """Where the weights at ``path`` came from: the Hub repository and revision of a download record or of a Hugging
    Face cache, else the name of the repository folder (for the generic file names of a repository) or of the file."""
    path = path.absolute()
    for folder in path.parents[:2]:
        # An unreadable download record must not prevent loading.
        with contextlib.suppress(ModelFileError, KeyError):
            record = read_json(folder / RECORD)
            return f"{record['repository']}@{record['commit']}"
    parts = path.parts
    for part, marker, revision in zip(parts, parts[1:], parts[2:], strict=False):
        if part.startswith("models--") and marker == "snapshots":
            return f"{part.removeprefix('models--').replace('--', '/')}@{revision}"
    return path.parent.parent.name if path.stem in _GENERIC_STEMS else path.stem


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
