"""The manifest of an output folder: Parquet files in ``manifest/``, one row per image. A rerun continues from it.

Rows are appended as new files, because a Parquet file cannot grow; readers such as pandas, DuckDB and
``pyarrow.dataset`` take the folder for one table. Several processes may append at once.
"""

import hashlib
import io
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

#: What the text chunk of a PNG says, which together with the pixels makes its bytes: the same in every run.
SETTINGS = ("name", "id", "prompt", "seed", "width", "height", "steps", "reference", "lora", "lora_strength", "source")
SCHEMA = pa.schema([
    ("name", pa.string()), ("id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()), ("width", pa.int32()),
    ("height", pa.int32()), ("steps", pa.int32()), ("reference", pa.string()), ("lora", pa.string()),
    ("lora_strength", pa.float64()), ("source", pa.string()), ("model", pa.string()), ("dtype", pa.string()),
    ("precision", pa.string()), ("batch", pa.int32()), ("sha256", pa.string()), ("bytes", pa.int64()),
    ("seconds", pa.float64()), ("worker", pa.string())])
#: Rows or seconds after which what is new is written. What a crash loses is read from the images again.
_ROWS, _SECONDS = 1000, 30


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, and rename it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name != "nt":  # the rename itself, which Windows flushes by itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class Manifest:
    """``common`` are the columns that all rows of a run share: model, dtype, precision, batch."""

    def __init__(self, out: Path, common: dict[str, Any]):
        self._out, self._common = out, common
        self._folder = out / "manifest"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._new: list[dict[str, Any]] = []
        self._written = time.monotonic()

    def done(self, names: set[str]) -> set[str]:
        """Which of ``names`` have their image. Rows whose image is gone are removed; images without a row get one."""
        recorded = set()
        for path in sorted(self._folder.glob("*.parquet")):
            table = pq.read_table(path, schema=SCHEMA)
            stale = [name in recorded or (name in names and not self._image(name).exists())
                     for name in table["name"].to_pylist()]
            if any(stale):
                table = table.filter(pa.array([not each for each in stale]))
                self._write(table)
                path.unlink()
            recorded.update(table["name"].to_pylist())
        for name in names - recorded:
            if self._image(name).exists():
                self.add(_recovered(self._image(name)))
                recorded.add(name)
        self.flush()
        return recorded & names

    def add(self, row: dict[str, Any]) -> None:
        """Record an image. Written after a while, or by :meth:`flush`."""
        self._new.append({key: row.get(key) for key in SCHEMA.names} | self._common)
        if len(self._new) >= _ROWS or time.monotonic() - self._written > _SECONDS:
            self.flush()

    def flush(self) -> str | None:
        """Write what is new; what went wrong, in which case nothing is forgotten."""
        self._written = time.monotonic()
        if self._new:
            try:
                self._write(pa.Table.from_pylist(self._new, SCHEMA))
            except OSError as error:
                return f"{self._folder}: {error.strerror}; the images are there, and the same command records them"
            self._new = []
        return None

    def _image(self, name: str) -> Path:
        return self._out / f"{name}.png"

    def _write(self, table: pa.Table) -> None:
        stream = io.BytesIO()
        pq.write_table(table, stream)
        write_whole(self._folder / f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}.parquet", stream.getvalue())


def _recovered(path: Path) -> dict[str, Any]:
    """The manifest row of an image whose run ended before it was recorded: all but the seconds and the worker."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        settings = json.loads(image.text["bonsai"])
    return {key: settings[key] for key in SETTINGS} | {"sha256": hashlib.sha256(content).hexdigest(),
                                                       "bytes": len(content)}


def read(out: Path) -> list[dict[str, Any]]:
    """All rows, each image once, by name."""
    paths = sorted((out / "manifest").glob("*.parquet"))
    rows = {row["name"]: row for path in paths for row in pq.read_table(path, schema=SCHEMA).to_pylist()}
    return [rows[name] for name in sorted(rows)]
