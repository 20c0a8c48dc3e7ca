"""What to make: the rows of a prompt file, the name that each image follows from, and the tasks that workers get.

A prompt file is text (one prompt per line), JSON lines, CSV or Parquet, with the columns of :class:`Row`.
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ...loaders import ModelFileError, Repository, container_suffixes
from ...loaders.description import sha256
from ...loaders.errors import refusing
from ...loaders.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, no_progress
from ..generate import check_settings


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
#: Suffixes of what a model's folder holds beside its tensors.
_BESIDE = {".json", ".txt", ".jinja", ".model"}


def _text(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ({"prompt": line.strip()} for line in file if line.strip())


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".txt": _text, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}


def read(path: Path, defaults: Row) -> Iterator[Row | ValueError]:
    """The rows of a prompt file; a ValueError, which names the row, in the place of one that cannot be used.

    A column that a row leaves out or empty has the value of ``defaults``. Raises ModelFileError for a file that is not
    a prompt file.
    """
    if path.suffix.lower() not in READERS:
        raise ModelFileError(path, f"prompts in a {', '.join(READERS)} file", path.suffix or "no suffix",
                             "give the file one of these names")
    # pyarrow's errors are ValueErrors, as JSON's are
    with refusing(path, "a readable prompt file", "check the file", OSError, ValueError, csv.Error):
        for number, record in enumerate(READERS[path.suffix.lower()](path), 1):
            if not isinstance(record, dict) or (unknown := set(map(str, record)) - set(COLUMNS)):
                found = f"column {min(unknown)}" if isinstance(record, dict) else "something else"
                raise ModelFileError(path, f"a table of {', '.join(COLUMNS)}", found, "rename or remove it")
            try:
                yield make(record, defaults, path.parent)
            except ValueError as error:
                yield ValueError(f"row {number} of {path.name}: {error}")


def make(record: dict[str, Any], defaults: Row, folder: Path) -> Row:
    """A checked row; relative paths start at ``folder``. Raises ValueError."""
    given = {}
    for name, value in record.items():
        if value is None or value == "":
            continue
        try:
            given[name] = COLUMNS[name](value)
            if (isinstance(value, float) and given[name] != value) or isinstance(value, bool):
                raise ValueError
            str(given[name]).encode()  # half a character cannot be recorded
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{name} cannot be {value!r}") from None
    row = replace(defaults, **given)
    if not row.prompt.strip():
        raise ValueError("the prompt is empty")
    check_settings(row.width, row.height, row.steps, row.seed)
    for name in ("reference", "lora"):
        if getattr(row, name):
            path = folder.absolute() / getattr(row, name)
            if not path.is_file():
                raise ValueError(f"{name} {path} does not exist")
            row = replace(row, **{name: str(path)})
    if row.reference:
        try:
            with Image.open(row.reference) as image:
                image.verify()
        except Exception as error:  # Pillow's decoders raise whatever they come across
            raise ValueError(f"reference {row.reference} is not an image") from error
    return row


def with_seeds(row: Row, count: int) -> Iterator[Row]:
    """``row`` with its seed and the ``count - 1`` after it."""
    return (replace(row, seed=row.seed + i) for i in range(count))


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
    """Tasks of at most ``size`` rows that can be denoised together; every row a dict with its ``name``."""
    ordered = sorted(rows.items(), key=lambda item: (*item[1].task_key(), item[1].prompt, item[1].seed))
    for _, group in itertools.groupby(ordered, key=lambda item: item[1].task_key()):
        while part := list(itertools.islice(group, size)):
            yield [{"name": key} | asdict(row) for key, row in part]


def named(rows: Iterable[Row], model: dict[str, Any]) -> dict[str, Row]:
    """Rows by name; rows that repeat one another are one image."""
    return {name(row, model): row for row in rows}
