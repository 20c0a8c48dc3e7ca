"""What to make: the rows of a prompt file, the name that each image follows from, and the tasks that workers get.

A prompt file (see :mod:`.table`) has the columns of :class:`Row`.
"""

import hashlib
import itertools
import json
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...loaders import ModelFileError, Repository, container_suffixes
from ...loaders.description import sha256
from ...loaders.errors import refusing
from ...loaders.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, locate, no_progress
from ..generate import check_settings
from ..references import open_image
from . import table


@dataclass(frozen=True)
class Row:
    """One image. Paths are absolute, or empty for none; ``id`` is the user's own label, or empty."""

    prompt: str
    seed: int = 0
    width: int = 1024
    height: int = 1024
    steps: int = 4
    reference: str = ""
    lora: str = ""
    lora_strength: float = 1.0
    id: str = ""

    def task_key(self) -> tuple:
        """Rows with equal keys can share a task. Seeds of one prompt come next to each other in this order."""
        return self.lora, self.lora_strength, self.reference, self.width, self.height, self.steps


#: What a prompt file may have, with their types.
COLUMNS = {field.name: field.type for field in fields(Row)}
#: What pandas calls an index without a name, in Parquet and where it reads its own CSV.
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+")
#: Suffixes of what a model's folder holds beside its tensors.
_BESIDE = {".json", ".txt", ".jinja", ".model"}


def read(path: Path, defaults: Row) -> Iterator[Row | ValueError]:
    """The rows of a prompt file; a ValueError, which names the row, in the place of one that cannot be used.

    A column that a row leaves out or empty has the value of ``defaults``. Raises ModelFileError for a file that is not
    a prompt file.
    """
    if path.suffix.lower() not in table.READERS:
        raise ModelFileError(path, f"prompts in a {', '.join(table.READERS)} file", path.suffix or "no suffix",
                             "save it as CSV (UTF-8), or give it one of these names")
    # pyarrow's errors are ValueErrors, as JSON's are
    with refusing(path, "a readable prompt file", "correct it, or save it again as UTF-8", OSError, ValueError,
                  RecursionError):
        for number, cells in table.READERS[path.suffix.lower()](path):
            record, nameless = _record(path, cells)
            try:
                if nameless:
                    raise ValueError(f"{nameless[0]!r} stands in no column; a cell with a separator needs quotes")
                yield make(record, defaults, path.parent)
            except (ValueError, ModelFileError) as error:
                yield ValueError(f"row {number} of {path.name}: {error}")


def _record(path: Path, cells: Any) -> tuple[dict[str, Any], list[Any]]:
    """Cells by column, and those without one. The first column may lack its name: pandas writes its index there."""
    if not isinstance(cells, tuple):
        raise ModelFileError(path, f"a table of {', '.join(COLUMNS)}", "something else", "name the columns")
    named = [("_".join(str(name).lower().split()), cell) for name, cell in cells if not _INDEX.fullmatch(str(name))]
    names = [name for name, _ in named if name]
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            raise ModelFileError(path, f"a table of {', '.join(COLUMNS)}",
                                 f"column {name}{' twice' if name in COLUMNS else ''}", "rename or remove it")
    return ({name: cell for name, cell in named if name},
            [cell for name, cell in named[1:] if not name and str(cell).strip()])


def make(record: dict[str, Any], defaults: Row, folder: Path) -> Row:
    """A checked row; relative paths start at ``folder``. Raises ValueError, and ModelFileError for a reference."""
    given = {}
    for name, cell in record.items():
        try:
            given[name] = table.value(COLUMNS[name], cell)
        except (ValueError, ArithmeticError):
            raise ValueError(f"{name} cannot be {reprlib.repr(cell)}") from None
    row = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    if not row.prompt.strip():
        raise ValueError("the prompt is empty")
    check_settings(row.width, row.height, row.steps, row.seed, row.prompt)
    for name in ("reference", "lora"):
        if getattr(row, name):
            path = locate(folder.absolute(), getattr(row, name))
            if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
                raise ValueError(f"{name} {path} does not exist")
            row = replace(row, **{name: str(path)})
    if row.reference:
        _check_reference(row.reference)
    return row


@cache
def _check_reference(path: str) -> None:
    open_image(Path(path))


@cache
def digest(path: Path) -> str:
    """SHA-256 of a file, or of a model's files in a folder with their names: what a system leaves beside them, such as
    .DS_Store and Thumbs.db, does not count."""
    if path.is_file():
        return sha256(path, no_progress)
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    suffixes = {*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES, *container_suffixes(), *_BESIDE}
    kept = sorted(file.parts for file in inside
                  if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in file.parts))
    names = [["/".join(parts), digest(path.joinpath(*parts))] for parts in kept]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def model_digest(parts: Repository) -> str:
    """SHA-256 over the files that images depend on: a download of the same revision has the same."""
    paths = (parts.transformer, parts.text_encoder, parts.tokenizer, parts.vae, parts.scheduler)
    return hashlib.sha256(json.dumps([path and digest(path) for path in paths]).encode()).hexdigest()


def name(row: Row, model: dict[str, Any]) -> str:
    """The name of the row's image: 80 bits of a hash of all that determines it. ``model`` has the facts that the rows
    share: the model's digest, dtype and so on. Files count by content, so a folder may move."""
    facts = asdict(row) | {key: getattr(row, key) and digest(Path(getattr(row, key))) for key in ("reference", "lora")}
    return hashlib.sha256(json.dumps([facts, model], sort_keys=True).encode()).hexdigest()[:20]


def tasks(rows: dict[str, Row], size: int) -> Iterator[list[dict[str, Any]]]:
    """Tasks of at most ``size`` rows that can be denoised together; every row as ``stages.py`` wants it."""
    ordered = sorted(rows.items(), key=lambda item: (*item[1].task_key(), item[1].prompt, item[1].seed))
    for _, group in itertools.groupby(ordered, key=lambda item: item[1].task_key()):
        while part := list(itertools.islice(group, size)):
            yield [{"name": key, "data": None, "seconds": 0.0} | asdict(row) for key, row in part]
