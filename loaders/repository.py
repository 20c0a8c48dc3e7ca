"""A downloaded repository: the parts it consists of, and where its weights came from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..published import PARTIAL, RECORD
from .errors import DOWNLOAD_REPOSITORY, ModelFileError
from .files import read_json
from .kinds import part_of
from .opening import WELL_KNOWN, files_in, folders_in, open_tensors

#: Files of which a tokenizer needs one of these sets.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

#: The folders in which the published repositories keep their parts.
_FOLDERS = {
    "transformer": ("transformer", "transformer-packed-mflux", "transformer-gemlite-int1", "transformer-gemlite-int2"),
    "text_encoder": ("text_encoder", "text_encoder-mlx-4bit", "text_encoder-hqq-4bit"),
    "vae": ("vae",),
}


@dataclass
class Repository:
    """The parts of a downloaded repository; a path is None where the folder has no such part, or none that can be told.

    ``problems``: why a part is None, by its name, and under ``""`` what else could not be read.
    """

    path: Path
    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    problems: dict[str, ModelFileError] = field(default_factory=dict)

    def require(self, *parts: str) -> Path:
        """The path of the last of ``parts`` (names of fields). Raises ModelFileError for the first that is missing."""
        for part in parts:
            if getattr(self, part) is None:
                if error := self.problems.get(part, self.problems.get("")):
                    raise error
                raise ModelFileError(self.path, f"a folder with the {part.replace('_', ' ')} of Bonsai Image", "none",
                                     DOWNLOAD_REPOSITORY)
        return getattr(self, parts[-1])


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
    return path.parent.parent.name if path.name in WELL_KNOWN else path.stem


def snapshot(path: Path) -> Path:
    """The folder with the files of a Hugging Face cache entry (``models--...``); any other path as it is.

    Raises ModelFileError where it holds several snapshots, none of them that of ``refs/main``.
    """
    if not os.path.isdir(path / "snapshots"):
        return path
    found = folders_in(path / "snapshots")
    with contextlib.suppress(OSError, ValueError):
        main = (path / "refs" / "main").read_text(encoding="utf-8").strip()
        found = [folder for folder in found if folder.name == main] or found
    if len(found) != 1:
        raise ModelFileError(path, "one snapshot, or that of refs/main", f"{len(found)}",
                             "choose one of the folders in snapshots" if found else DOWNLOAD_REPOSITORY)
    return found[0]


def is_repository(path: Path | str) -> bool:
    """Whether ``path`` can only be a repository, not a model: a folder without tensor files of its own."""
    return os.path.isdir(path) and not files_in(Path(path))


def resembles_repository(path: Path) -> bool:
    """Whether ``path`` has folders with tensor files, as a repository does, or such folders in folders of their
    own name, and is no unfinished download. Opens no file."""
    with contextlib.suppress(ModelFileError):
        return not path.name.endswith(PARTIAL) and any(
            files_in(folder) or (os.path.isdir(folder / folder.name) and files_in(folder / folder.name))
            for folder in folders_in(snapshot(path)))
    return False


def _folders(path: Path) -> Iterator[Path]:
    """The folders in ``path``, and those in folders without tensor files of their own."""
    for folder in folders_in(path):
        yield folder
        try:
            if not files_in(folder):
                yield from folders_in(folder)
        except ModelFileError:
            continue  # find_repository meets the same error, and keeps it


def find_repository(path: Path | str) -> Repository:
    """Find the parts of a repository by what its folders contain; ``path`` may be a Hugging Face cache entry.

    Raises ModelFileError without a diffusion model. What is wrong with a folder is remembered, and only counts once a
    part is missing.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise ModelFileError(path, "the folder of a downloaded Bonsai Image repository", "no such folder",
                             "download the whole repository, not one file of it")
    if path.name.endswith(PARTIAL):
        raise ModelFileError(path, "a finished download", "an interrupted one",
                             "run the same bonsai-image download command again")
    repository = Repository(path)
    found: dict[str, list[Path]] = {part: [] for part in _FOLDERS}
    for folder in _folders(snapshot(path)):
        try:
            _sort(folder, repository, found)
        except ModelFileError as error:
            part = next((part for part in _FOLDERS if folder.name.startswith(part)), "")
            repository.problems.setdefault(part, error)
    for part, folders in found.items():
        known = [folder for folder in folders if folder.name in _FOLDERS[part]] or folders
        if len(known) == 1:
            setattr(repository, part, known[0])
        elif known:
            names = " and ".join(folder.name for folder in known)
            repository.problems[part] = ModelFileError(path, f"one {part.replace('_', ' ')}", names,
                                                       "choose one of these folders, or move the others away")
    if repository.transformer is None and not repository.problems:
        class_name = read_json(path / "model_index.json").get("_class_name", "none")
        raise ModelFileError(path, "a folder with the diffusion model of Bonsai Image", str(class_name),
                             DOWNLOAD_REPOSITORY)
    repository.require("transformer")
    return repository


def _sort(folder: Path, repository: Repository, found: dict[str, list[Path]]) -> None:
    """Add ``folder`` to what it is: scheduler, tokenizer, or one of the parts in ``found``. Raises ModelFileError."""
    if (folder / "scheduler_config.json").is_file():
        repository.scheduler = repository.scheduler or folder
    for candidate in (folder, folder / "tokenizer"):
        # Without its vocabulary a tokenizer still loads, and turns every prompt into nothing.
        if any(all((candidate / name).is_file() for name in names) for names in _VOCABULARIES):
            repository.tokenizer = repository.tokenizer or candidate
    if files_in(folder) and (part := part_of(open_tensors(folder).tensors)):
        found[part].append(folder)
