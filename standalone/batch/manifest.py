"""The manifest of an output folder: Parquet files in ``manifest/``, one row per image. A rerun continues from it.

Rows are appended as new files, because a Parquet file cannot grow; readers such as pandas, DuckDB and
``pyarrow.dataset`` take the folder for one table. Several processes may append at once: a lock, which the system
releases when a process dies, lets one at a time read and write, so that no image has two rows.
"""

import contextlib
import hashlib
import io
import json
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...disk import alone, patiently, reason, write_whole
from ...loaders.errors import ModelFileError, refusing

#: What the text chunk of a PNG says: only what is the same in every run, for its bytes must be, too.
SETTINGS = ("name", "id", "prompt", "seed", "width", "height", "steps", "reference", "lora", "lora_strength", "source")
SCHEMA = pa.schema([
    ("name", pa.string()), ("id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()), ("width", pa.int32()),
    ("height", pa.int32()), ("steps", pa.int32()), ("reference", pa.string()), ("lora", pa.string()),
    ("lora_strength", pa.float64()), ("source", pa.string()), ("model", pa.string()), ("dtype", pa.string()),
    ("precision", pa.string()), ("batch", pa.int32()), ("sha256", pa.string()), ("bytes", pa.int64()),
    ("seconds", pa.float64()), ("worker", pa.string())])
#: Rows or seconds after which what is new is written. What a crash loses is read from the images again.
_ROWS, _SECONDS = 1000, 30


class Manifest:
    """``common`` are the columns that all rows of a run share: model, dtype, precision, batch."""

    def __init__(self, out: Path, common: dict[str, Any]):
        self._out, self._common = out, common
        self._folder = out / "manifest"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._new: list[dict[str, Any]] = []
        self._read: set[Path] = set()
        self._recorded: set[str] = set()
        self._lock = self._folder / ".lock"
        self._written = time.monotonic()

    def done(self, names: set[str]) -> set[str]:
        """Which of ``names`` have their image. Rows whose image is gone are removed; images without a row get one."""
        recorded = self._recorded = set[str]()
        with alone(self._lock):
            for path, table in _tables(self._folder):
                stale = [name in recorded or (name in names and not self._image(name).exists())
                         for name in table["name"].to_pylist()]
                if any(stale):
                    table = table.filter(pa.array([not each for each in stale]))
                    self._write(table)
                    patiently(path.unlink)
                recorded.update(table["name"].to_pylist())
            self._read = set(self._folder.glob("*.parquet"))
            for name in names - recorded:
                if row := _recovered(self._image(name)):
                    self._new.append(row | self._common)
        found = (recorded | {row["name"] for row in self._new}) & names
        self.flush()
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Record an image. Written after a while, or by :meth:`flush`."""
        self._new.append(row | self._common)
        if len(self._new) >= _ROWS or time.monotonic() - self._written > _SECONDS:
            self.flush()

    def flush(self) -> str | None:
        """Write the new rows that no other run has recorded. Returns what went wrong; the next call tries again."""
        self._written = time.monotonic()
        if self._new:
            try:
                with alone(self._lock):
                    for path, table in _tables(self._folder, self._read):
                        self._read.add(path)
                        self._recorded.update(table["name"].to_pylist())
                    rows = [row for row in self._new if row["name"] not in self._recorded]
                    self._write(pa.Table.from_pylist(rows, SCHEMA))
            except ModelFileError as error:
                return str(error)
            except OSError as error:
                return f"{self._folder}: {reason(error)}; the images are there, and the same command records them"
            self._new = []
        return None

    def _image(self, name: str) -> Path:
        return self._out / f"{name}.png"

    def _write(self, table: pa.Table) -> None:
        if not len(table):
            return
        stream = io.BytesIO()
        pq.write_table(table, stream)
        write_whole(self._folder / f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}.parquet", stream.getvalue())


def _recovered(path: Path) -> dict[str, Any] | None:
    """The manifest row of an image whose run ended before it was recorded: all but the seconds and the worker. None for
    a damaged image, which is made again."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            settings = json.loads(image.text["bonsai"])
        row = {key: settings[key] for key in SETTINGS}
    except (OSError, ValueError, LookupError, AttributeError, SyntaxError):  # as Pillow's decoders raise them
        return None
    return row | {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _tables(folder: Path, known: Collection[Path] = ()) -> Iterator[tuple[Path, pa.Table]]:
    """The files in ``folder`` except ``known`` ones, each with its rows. Raises ModelFileError for a damaged one."""
    for path in sorted(set(folder.glob("*.parquet")).difference(known)):
        # A file may be gone: another run has put a new one into its place.
        with (refusing(path, "rows of images", "remove it, and the same command records its images again", OSError,
                       ValueError), contextlib.suppress(FileNotFoundError)):
            yield path, pq.read_table(path, schema=SCHEMA)


def read(out: Path) -> list[dict[str, Any]]:
    """All rows, each image once, by name."""
    rows = {row["name"]: row for _, table in _tables(out / "manifest") for row in table.to_pylist()}
    return [rows[name] for name in sorted(rows)]
