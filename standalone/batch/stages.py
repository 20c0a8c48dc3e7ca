"""The four stages that a worker runs: encode, denoise, decode, write. Each keeps its model loaded and takes tasks.

A task is a list of rows. The ``data`` of a row is what the last stage made for it: its prompt's embeddings, its
latents, its pixels. A row that fails gets an ``error``, one sentence, and later stages leave it alone.
"""

import hashlib
import io
import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ...disk import reason, write_whole
from ...loaders import ModelFileError, Repository, load_lora, load_transformer
from ...loaders.files import refuse_changed
from ...ops.backends import selfcheck
from .. import generate, lora, models
from ..references import open_image
from .manifest import SETTINGS

#: A row is given up once this many workers have died on it: what kills three in a row will kill the next.
MOST_DEATHS = 3
#: Folder, below the output folder, of the marks of rows that are being computed.
STARTED = ".started"

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What all workers of a run are told. ``batch`` rows are denoised at once, with ``threads`` CPU threads."""

    repository: Repository
    out: Path
    compute: generate.Compute
    batch: int
    threads: int


def sent(rows: list[Record]) -> dict[str, bytes]:
    """A task as Ray Data moves it."""
    stream = io.BytesIO()
    torch.save(rows, stream)
    return {"task": stream.getvalue()}


def received(task: dict[str, bytes]) -> list[Record]:
    """The rows of :func:`sent`."""
    return torch.load(io.BytesIO(task["task"]), weights_only=True)


class Stage:
    """Runs rows in groups, keeps count of workers that died on a row, and turns exceptions into sentences."""

    def __init__(self, work: Work):
        torch.set_num_threads(work.threads)
        # Where no host has named a file, on a cluster, all workers choose by this one.
        os.environ.setdefault(selfcheck.FILE, str(work.out / ".times.json"))
        self.work, self.compute, self.repository = work, work.compute, work.repository

    def run(self, rows: list[Record]) -> list[torch.Tensor | None]:
        """The next ``data`` of each row."""
        raise NotImplementedError

    def groups(self, rows: list[Record]) -> Iterator[list[Record]]:
        """Which rows :meth:`run` gets together."""
        return ([row] for row in rows)

    def __call__(self, task: dict[str, bytes]) -> dict[str, bytes]:
        rows = received(task)
        self.advance(rows)
        return sent(rows)

    def advance(self, rows: list[Record]) -> None:
        """Bring ``rows`` through this stage."""
        for row in rows:
            if "error" not in row and self._deaths(row) >= MOST_DEATHS:
                row["error"] = f"{self._deaths(row)} workers died on it in the stage {type(self).__name__.lower()}"
        for group in list(self.groups([row for row in rows if "error" not in row])):
            self._run(group)

    def _run(self, group: list[Record]) -> None:
        start = time.perf_counter()
        try:
            with ExitStack() as marks, torch.inference_mode():
                for mark in map(self._mark, group):  # one that is still there was left by a worker that died
                    marks.callback(mark.unlink, missing_ok=True)
                    with mark.open("ab") as file:
                        file.write(b".")
                results = self.run(group)
        except Exception as error:  # whatever fails, in whichever library, is that row's failure
            if len(group) > 1:
                for row in group:
                    self._run([row])
            else:
                said = str(error) if isinstance(error, ModelFileError) else f"{type(error).__name__}: {reason(error)}"
                group[0] |= {"data": None, "error": said}
            return
        seconds = (time.perf_counter() - start) / len(group)
        for row, result in zip(group, results, strict=True):
            row |= {"data": result, "seconds": row["seconds"] + seconds}

    def _mark(self, row: Record) -> Path:
        return self.work.out / STARTED / f"{row['name']}.{type(self).__name__.lower()}"

    def _deaths(self, row: Record) -> int:
        with suppress(FileNotFoundError):
            return self._mark(row).stat().st_size
        return 0


class Encode(Stage):
    """Prompts to embeddings ``(tokens, channels)``, each prompt once for all the seeds that follow one another."""

    def __init__(self, work: Work):
        super().__init__(work)
        pipeline = generate.text_pipeline(self.repository, self.compute)
        self.encode = lru_cache(1)(lambda prompt: generate.encode(pipeline, [prompt], self.compute)[0].cpu())

    def run(self, rows: list[Record]) -> list[torch.Tensor | None]:
        (row,) = rows
        return [self.encode(row["prompt"])]


class Denoise(Stage):
    """Embeddings to latents ``(C, height / 8, width / 8)``, in batches of one constant size.

    The size of a matrix product decides the order of its sums, so a short batch is filled up with copies: an image
    then has the same bits beside any others. A row that a worker died on is run alone.
    """

    def __init__(self, work: Work):
        super().__init__(work)
        loaded = load_transformer(self.repository.transformer)
        self.source, self.stamps = loaded.source, loaded.stamps
        transformer = models.transformer_module(loaded, *self.compute)
        self.pipeline = generate.image_pipeline(self.repository, transformer, self.compute)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.hooks = lru_cache(1)(lambda path, strength: lora.hooks(transformer, [(load_lora(path), strength)]))

    def groups(self, rows: list[Record]) -> Iterator[list[Record]]:
        def alike(row: Record) -> tuple:
            return (0, row["name"]) if self._deaths(row) else (1, len(row["data"]))  # a long prompt has more tokens

        for _, group in itertools.groupby(sorted(rows, key=alike), key=alike):
            while part := list(itertools.islice(group, self.work.batch)):
                yield part

    def run(self, rows: list[Record]) -> list[torch.Tensor | None]:
        refuse_changed(self.stamps)
        first, filled = rows[0], rows + rows[-1:] * (self.work.batch - len(rows))
        embeddings = torch.stack([row["data"] for row in filled]).to(self.compute.device)
        references = [open_image(Path(first["reference"]))] if first["reference"] else []
        with lora.applied(self.hooks(first["lora"], first["lora_strength"]) if first["lora"] else []):
            latents = generate.denoise(self.pipeline, embeddings, [row["seed"] for row in filled], first["width"],
                                       first["height"], first["steps"], references)
        for row in rows:
            row |= {"source": self.source, "worker": self.worker}
        return list(latents[:len(rows)].to("cpu", self.compute.dtype, copy=True))


class Decode(Stage):
    """Latents to pixels, uint8 ``(height, width, 3)``."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.vae = models.vae_module(self.repository.vae, self.compute.device, self.compute.dtype)
        self.processor = VaeImageProcessor()

    def run(self, rows: list[Record]) -> list[torch.Tensor | None]:
        (row,) = rows
        (image,) = generate.decode(self.vae, self.processor, row["data"][None].to(self.compute.device))
        return [torch.from_numpy(np.array(image))]


class Write(Stage):
    """Pixels to ``<name>.png``, which is there whole or not at all."""

    def run(self, rows: list[Record]) -> list[torch.Tensor | None]:
        (row,) = rows
        content = generate.png(Image.fromarray(row["data"].numpy()), {key: row[key] for key in SETTINGS})
        write_whole(self.work.out / f"{row['name']}.png", content)
        row |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return [None]


#: In the order that a task passes them.
STAGES = (Encode, Denoise, Decode, Write)
