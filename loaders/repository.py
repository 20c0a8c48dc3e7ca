"""A downloaded repository: the parts it consists of, how they are told apart, and where its weights came from."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..published import PARTIAL, RECORD, weight_files
from .errors import CHOOSE_MODEL, CHOOSE_TEXT_ENCODER, DOWNLOAD_REPOSITORY, ModelFileError
from .files import TensorFile, read_json
from .klein import is_klein
from .lora_names import of_lora
from .names import nested
from .opening import WELL_KNOWN, files_in, folders_in, open_tensors
from .qwen3 import is_qwen3
from .vae import is_vae

#: The parts that hold weights, and how the names of their tensors show which they are.
_PARTS: dict[str, Callable[[Mapping[str, object]], bool]] = {
    "transformer": is_klein, "text_encoder": is_qwen3, "vae": is_vae}
#: What they are called in sentences.
WORDS = {"transformer": "diffusion model", "text_encoder": "text encoder", "vae": "VAE"}
_CHOOSE = {"transformer": CHOOSE_MODEL, "text_encoder": CHOOSE_TEXT_ENCODER, "vae": "choose the VAE of Bonsai Image"}

#: Files of other kinds that users confuse with ours: what they are called, and how their names show it.
_OTHERS: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("a LoRA", of_lora),
    ("a FLUX.1 model", re.compile(r"(^|\.)(double_blocks\.0\.img_mod|transformer_blocks\.0\.norm1_context)\.").search),
    ("the VAE of another model", re.compile(r"^decoder\.conv_in\.weight$").search),
)

#: The folders in which repositories keep their parts, which are preferred to others with the same part.
_FOLDERS = {*_PARTS, *(file.path.split("/")[0] for _, file in weight_files())}

#: What the names of the tensors begin with that hold the files of a tokenizer, in a checkpoint that has one.
TOKENIZER = "bonsai.tokenizer."
#: What ``model_index.json`` names in every published repository.
_PIPELINE = "Flux2KleinPipeline"
#: Files of which a tokenizer needs one of these sets, and what may lie beside them.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json")


@dataclass
class Repository:
    """The parts of a downloaded repository, or of a checkpoint, where every part has the path of the one file; a path
    is None where there is no such part, or none that can be told.

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
                raise self.problems.get(part) or self.problems.get("") or ModelFileError(
                    self.path, f"a {'folder' if self.path.is_dir() else 'checkpoint'} with the "
                    f"{part.replace('_', ' ')} of Bonsai Image", "none", DOWNLOAD_REPOSITORY if self.path.is_dir() else
                    "choose a whole repository, or what bonsai-image convert --to checkpoint makes of one")
        return getattr(self, parts[-1])


def parts_of(tensors: Mapping[str, object]) -> list[str]:
    """Which parts of a repository these tensors are: of ``transformer``, ``text_encoder``, ``vae`` one, none, or in a
    checkpoint several."""
    return [part for part, matches in _PARTS.items() if matches(nested(tensors, part)[1])]


def require_part(file: TensorFile, part: str) -> None:
    """Raise ModelFileError, saying what ``file`` is instead, unless its tensors are those of ``part``."""
    if _PARTS[part](file.tensors):
        return
    found = " and ".join(WORDS[other] for other in parts_of(file.tensors))
    others = (label for label, matches in _OTHERS if any(map(matches, file.tensors)))
    text = f"the {found} of Bonsai Image" if found else next(others, file.sample())
    raise ModelFileError(file.path, f"the {WORDS[part]} of Bonsai Image", text, _CHOOSE[part])


def source(path: Path) -> str:
    """Where the weights at ``path`` came from: the Hub repository and revision of a download record or of a Hugging
    Face cache, else the name of the repository folder (for the generic file names of a repository) or of the file."""
    path = path.absolute()
    for folder in path.parents[:2]:
        # An unreadable download record must not prevent loading.
        with contextlib.suppress(ModelFileError, KeyError):
            record = read_json(folder / RECORD)
            return f"{record['repository']}@{record['commit']}"
    if cached := re.search(r"/models--([^/]+)/snapshots/([^/]+)", path.as_posix()):
        return f"{cached[1].replace('--', '/')}@{cached[2]}"
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
    own name, and is no unfinished download. Opens no file but ``model_index.json``, which may name no other pipeline
    of diffusers."""
    with contextlib.suppress(ModelFileError):
        return not path.name.endswith(PARTIAL) and any(
            files_in(folder) or (os.path.isdir(folder / folder.name) and files_in(folder / folder.name))
            for folder in folders_in(snapshot(path))) and not _of_another_pipeline(snapshot(path))
    return False


def _of_another_pipeline(folder: Path) -> bool:
    with contextlib.suppress(ModelFileError):
        return read_json(folder / "model_index.json").get("_class_name", _PIPELINE) != _PIPELINE
    return False


def repositories_in(folder: Path, depth: int = 2) -> Iterator[Path]:
    """The folders in ``folder``, up to ``depth`` levels deep, that look like a downloaded repository."""
    # What cannot be read is left out: choosing it could only fail.
    with contextlib.suppress(ModelFileError):
        for child in folders_in(folder):
            if resembles_repository(child):
                yield child
            elif depth > 1:
                yield from repositories_in(child, depth - 1)


def _folders(path: Path) -> Iterator[Path]:
    """The folders in ``path``, and those in folders without tensor files of their own."""
    for folder in folders_in(path):
        yield folder
        with contextlib.suppress(ModelFileError):  # find_repository meets the same error, and keeps it
            if not files_in(folder):
                yield from folders_in(folder)


def find_repository(path: Path | str) -> Repository:
    """Find the parts of a repository by what its folders contain; ``path`` may be a Hugging Face cache entry, or a
    checkpoint file.

    Raises ModelFileError without a diffusion model. What is wrong with a folder is remembered, and only counts once a
    part is missing.
    """
    path = Path(path)
    if os.path.isfile(path):
        tensors = open_tensors(path).tensors
        transformer, text_encoder, vae = (path if part in parts_of(tensors) else None for part in _PARTS)
        tokenizer = path if _is_tokenizer({name.removeprefix(TOKENIZER) for name in tensors}) else None
        repository = Repository(path, transformer, text_encoder, vae, tokenizer)
        repository.require("transformer")
        return repository
    if not os.path.isdir(path):
        raise ModelFileError(path, "the folder of a downloaded Bonsai Image repository", "no such folder",
                             "download the whole repository, not one file of it")
    if path.name.endswith(PARTIAL):
        raise ModelFileError(path, "a finished download", "an interrupted one",
                             "run the same bonsai-image download command again")
    repository = Repository(path)
    found: dict[str, list[Path]] = {}
    for folder in _folders(snapshot(path)):
        try:
            for role, place in _roles(folder):
                found.setdefault(role, []).append(place)
        except ModelFileError as error:
            part = next((part for part in _PARTS if folder.name.startswith(part)), "")
            repository.problems.setdefault(part, error)
    for role, folders in found.items():
        known = [folder for folder in folders if folder.name in _FOLDERS] or folders
        if role not in _PARTS:
            setattr(repository, role, folders[0])
        elif len(known) == 1:
            setattr(repository, role, known[0])
        else:
            names = " and ".join(folder.name for folder in known)
            repository.problems[role] = ModelFileError(path, f"one {role.replace('_', ' ')}", names,
                                                       "choose one of these folders, or move the others away")
    if repository.transformer is None and not repository.problems:
        class_name = read_json(path / "model_index.json").get("_class_name", "none")
        broken = next((f"a link to nowhere, {each}" for each in path.rglob("*") if not os.path.exists(each)), "none")
        raise ModelFileError(path, "a folder with the diffusion model of Bonsai Image",
                             broken if class_name == _PIPELINE else str(class_name), DOWNLOAD_REPOSITORY)
    repository.require("transformer")
    return repository


def _is_tokenizer(files: set[str]) -> bool:
    # Without its vocabulary a tokenizer still loads, and turns every prompt into nothing.
    return any(files.issuperset(needed) for needed in _VOCABULARIES)


def _roles(folder: Path) -> Iterator[tuple[str, Path]]:
    """What ``folder`` is, as fields of a :class:`Repository`: scheduler, tokenizer, parts. Raises ModelFileError."""
    if (folder / "scheduler_config.json").is_file():
        yield "scheduler", folder
    for candidate in (folder, folder / "tokenizer"):
        if _is_tokenizer({name for name in TOKENIZER_FILES if (candidate / name).is_file()}):
            yield "tokenizer", candidate
    for part in parts_of(open_tensors(folder).tensors) if files_in(folder) else ():
        yield part, folder
