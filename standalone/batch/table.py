"""Prompt files as people export them: text, JSON, CSV or Parquet to rows of cells, and cells to values."""

import codecs
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

#: A row's number in the file, as a spreadsheet or an editor counts, and its (column, cell) pairs; a JSON value that
#: is no object stays as it is.
Numbered = tuple[int, Any]
#: What cells without a number may hold, in lower case.
_NOTHING = {"nan", "na", "n/a", "#n/a", "<na>", "none", "null"}


def _decoded(path: Path) -> str:
    """UTF-8, or UTF-16 with its byte order mark. Anything else could be read in several ways, so it is refused."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = re.split("\r\n|\r|\n", error.object[:error.start].decode(encoding, "ignore"))
        raise ValueError(f"a byte that is not {error.encoding.upper()} in line {len(before)}, "
                         f"character {len(before[-1]) + 1}") from error
    if "\0" in text:
        raise ValueError("NUL characters, as in UTF-16 without a byte order mark")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())


def _text(path: Path) -> Iterator[Numbered]:
    return ((number, (("prompt", line.strip()),)) for number, line in _lines(_decoded(path)))


def _json(path: Path) -> Iterator[Numbered]:
    """One object per line, or a list of objects."""
    text = _decoded(path)
    if text.lstrip().startswith("["):
        yield from enumerate(json.loads(text, object_pairs_hook=tuple), 1)
        return
    for number, line in _lines(text):
        try:
            yield number, json.loads(line, object_pairs_hook=tuple)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} in line {number}, character {error.colno}") from error


def _csv(path: Path) -> Iterator[Numbered]:
    """The separator is the one in the header, or what Excel's line ``sep=`` says."""
    text = _decoded(path)
    if stated := re.match('"?sep=(.)"?(\r\n|\r|\n)', text, re.IGNORECASE):
        text = text[stated.end():]
    header = re.match(r'\s*(?:"[^"]*"|[^"\r\n])*', text)[0]  # a quoted name may hold line breaks
    # With one column there is nothing to separate: commas belong to the prompt.
    separator = stated[1] if stated else next((each for each in "\t;,|" if each in header), "\x1f")
    number, names = 0, None
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                                                  skipinitialspace=True), 1):
            if names is None and any(cells):
                names = cells
            elif any(map(str.strip, cells)):
                yield number, tuple(itertools.zip_longest(names, cells, fillvalue=""))
    except csv.Error as error:
        raise ValueError(f"{error} in row {number + 1}") from error


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow.parquet as pq

    numbers = itertools.count(1)
    for batch in pq.ParquetFile(path).iter_batches():
        # Not as dicts, which would keep one of two columns of the same name.
        for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield next(numbers), tuple(zip(batch.schema.names, cells, strict=True))


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".txt": _text, ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def value(kind: type, cell: Any) -> Any:
    """A cell as ``str``, ``int`` or ``float``; None for an empty one. Raises ValueError or ArithmeticError.

    Whole numbers may be written as ``42.0``, ``42,0`` or ``4.2e1``, but not as ``1.000``, which is one or a thousand.
    """
    text = str(cell)
    if cell is None or cell != cell or not text.strip() or (kind is not str and text.strip().lower() in _NOTHING):
        return None
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float, Decimal)):
        raise ValueError(f"a {type(cell).__name__}")
    if kind is str:
        text.encode()  # a lone surrogate cannot be recorded
        return text
    number = Decimal(text.strip().replace(",", "."))
    if not math.isfinite(number):
        raise ValueError("not a number")
    if kind is float:
        return float(number)
    if (isinstance(cell, str) and re.search(r"\d[.,]\d{3}\s*$", text)) or number % 1:
        raise ValueError("not a whole number")
    return int(number)
