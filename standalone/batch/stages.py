"""The four stages that a worker runs: encode, denoise, decode, write. Each keeps its model loaded and takes tasks.

A task is ``{"rows": JSON list of rows, "data": uint8 (bytes,)}``. Every row knows the ``span`` of its own part of
``data``: its prompt's embeddings, then its latents, then its pixels. A row that fails gets an ``error``, one sentence,
and is passed on untouched.
"""

import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ...disk import write_whole
from ...loaders import ModelFileError, load_lora, load_transformer
from ...loaders.files import refuse_changed
from ...ops.backends import Setting, measuring
from .. import generate, lora, models
from ..references import open_image
from .manifest import SETTINGS

#: A row is given up once this many workers have died on it: what kills three in a row will kill the next.
MOST_DEATHS = 3
#: Folder, below the output folder, of the marks of rows that are being computed.
STARTED = ".started"


@dataclass(frozen=True)
class Work:
    """What all workers of a run are told. ``batch`` rows are denoised at once, with ``threads`` CPU threads."""

    checkpoint: Path
    transformer: Path | None
    vae: Path | None
    out: Path
    device: str
    dtype: torch.dtype
    setting: Setting
    batch: int
    threads: int


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def _tokens(row: dict[str, Any]) -> int:
    """The length of the row's embeddings, in bytes."""
    return row["span"][1] - row["span"][0]


class Stage:
    """Runs rows in groups, keeps count of workers that died on a row, and turns exceptions into sentences."""

    def __init__(self, work: Work):
        torch.set_num_threads(work.threads)
        # Where no host has named a file, on a cluster, all workers choose by this one.
        os.environ.setdefault(measuring.FILE, str(work.out / ".times.json"))
        self.work = work
        self.compute = generate.Compute(torch.device(work.device), work.dtype, work.setting)
        self.repository = generate.complete_repository(work.checkpoint, work.transformer, work.vae)

    def run(self, rows: list[dict[str, Any]], data: list[np.ndarray]) -> list[np.ndarray]:
        """``data`` of each row, uint8 ``(bytes,)``, to the next stage's."""
        raise NotImplementedError

    def groups(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Which rows :meth:`run` gets together."""
        return ([row] for row in rows)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        rows, data, parts = json.loads(task["rows"]), task["data"], []
        for row in rows:
            if "error" not in row and self._deaths(row) >= MOST_DEATHS:
                row["error"] = f"{self._deaths(row)} workers died on it in the stage {type(self).__name__.lower()}"
        for group in list(self.groups([row for row in rows if "error" not in row])):
            self._run(group, data, parts)
        return {"rows": json.dumps(rows), "data": np.concatenate(parts) if parts else np.zeros(1, np.uint8)}

    def _run(self, group: list[dict[str, Any]], data: np.ndarray, parts: list[np.ndarray]) -> None:
        start = time.perf_counter()
        try:
            with self._marked(group), torch.inference_mode():
                results = self.run(group, [data[slice(*row["span"])] for row in group])
        except Exception as error:  # whatever fails, in whichever library, is that row's failure
            if len(group) > 1:
                for row in group:
                    self._run([row], data, parts)
            else:
                lines = str(error).strip().splitlines()
                kind = "" if isinstance(error, ModelFileError) else f"{type(error).__name__}: "
                group[0]["error"] = f"{kind}{lines[0] if lines else 'no message'}"[:300]
            return
        seconds = (time.perf_counter() - start) / len(group)
        for row, result in zip(group, results, strict=True):
            if not parts or parts[-1] is not result:  # seeds of one prompt share its embeddings
                parts.append(result)
            end = sum(map(len, parts))
            row |= {"span": (end - len(result), end), "seconds": row["seconds"] + seconds}

    def _mark(self, row: dict[str, Any]) -> Path:
        return self.work.out / STARTED / f"{row['name']}.{type(self).__name__.lower()}"

    def _deaths(self, row: dict[str, Any]) -> int:
        try:
            return self._mark(row).stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def _marked(self, group: list[dict[str, Any]]) -> Iterator[None]:
        """Marks rows while they are computed. A mark that is still there was left by a worker that died."""
        marks = [self._mark(row) for row in group]
        for mark in marks:
            with mark.open("ab") as file:
                file.write(b".")
        try:
            yield
        finally:
            for mark in marks:
                mark.unlink(missing_ok=True)


class Encode(Stage):
    """Prompts to embeddings, each prompt once for all the seeds that follow one another."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.pipeline = generate.text_pipeline(self.repository, self.compute)
        self.last = ("", np.zeros(0, np.uint8))

    def run(self, rows: list[dict[str, Any]], data: list[np.ndarray]) -> list[np.ndarray]:
        (row,) = rows
        if row["prompt"] != self.last[0]:
            self.last = row["prompt"], _bytes(generate.encode(self.pipeline, [row["prompt"]], self.compute))
        return [self.last[1]]


class Denoise(Stage):
    """Embeddings to latents, in batches of one constant size.

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
        self.lora: tuple[tuple[str, float], lora.Hooks] = ("", 0.0), []

    def groups(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        suspects = [row for row in rows if self._deaths(row)]
        yield from ([row] for row in suspects)
        others = sorted((row for row in rows if row not in suspects), key=_tokens)
        for _, group in itertools.groupby(others, key=_tokens):  # a long prompt has more of them
            while part := list(itertools.islice(group, self.work.batch)):
                yield part

    def run(self, rows: list[dict[str, Any]], data: list[np.ndarray]) -> list[np.ndarray]:
        refuse_changed(self.stamps)
        first, copies = rows[0], self.work.batch - len(rows)
        tensors = [torch.from_numpy(part.copy()).view(self.work.dtype) for part in data]
        embeddings = torch.stack(tensors + tensors[-1:] * copies).to(self.compute.device)
        embeddings = embeddings.view(self.work.batch, -1, self.pipeline.transformer.config.joint_attention_dim)
        seeds = [row["seed"] for row in rows]
        references = [open_image(Path(first["reference"]))] if first["reference"] else []
        with self._lora(first["lora"], first["lora_strength"]):
            latents = generate.denoise(self.pipeline, embeddings, seeds + seeds[-1:] * copies, first["width"],
                                       first["height"], first["steps"], references)
        for row in rows:
            row |= {"source": self.source, "worker": self.worker}
        return [_bytes(each) for each in latents[:len(rows)].to(self.work.dtype)]

    def _lora(self, path: str, strength: float):
        if (path, strength) != self.lora[0]:
            found = lora.hooks(self.pipeline.transformer, [(load_lora(path), strength)]) if path else []
            self.lora = (path, strength), found
        return lora.applied(self.lora[1])


class Decode(Stage):
    """Latents to pixels, uint8 ``(height * width * 3,)``."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.vae = models.vae_module(self.repository.vae, self.compute.device, self.compute.dtype)
        self.processor = VaeImageProcessor()

    def run(self, rows: list[dict[str, Any]], data: list[np.ndarray]) -> list[np.ndarray]:
        (row,), (part,) = rows, data
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        latents = torch.from_numpy(part.copy()).view(self.work.dtype).to(self.compute.device)
        latents = latents.view(1, -1, row["height"] // scale, row["width"] // scale)
        (image,) = generate.decode(self.vae, self.processor, latents)
        return [np.frombuffer(image.tobytes(), np.uint8)]


class Write(Stage):
    """Pixels to ``<name>.png``, which is there whole or not at all."""

    def run(self, rows: list[dict[str, Any]], data: list[np.ndarray]) -> list[np.ndarray]:
        (row,), (pixels,) = rows, data
        image = Image.frombytes("RGB", (row["width"], row["height"]), pixels.tobytes())
        content = generate.png(image, {key: row[key] for key in SETTINGS})
        write_whole(self.work.out / f"{row['name']}.png", content)
        row |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return [np.zeros(1, np.uint8)]


#: In the order that a task passes them.
STAGES = (Encode, Denoise, Decode, Write)
