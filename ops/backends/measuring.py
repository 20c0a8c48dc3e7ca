"""Which of several ways to multiply is the fastest: timed once on this machine, and kept in a file.

The file is JSON, device -> kind of product -> way -> milliseconds. Hosts name it in the environment variable
:data:`FILE`, which the processes that they start inherit. Deleted, it is measured again; without one, or where it
cannot be written, the times are kept for the process.
"""

import contextlib
import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ...disk import alone, write_whole
from ..devices import device_name
from . import libraries, selfcheck
from .interface import Backend, Digits

#: The environment variable with the path of the file.
FILE = "BONSAI_IMAGE_TIMES"

#: Rows of the two products that are timed, and up to how many rows the first stands for.
ROWS, FEW = (32, 512), 64
#: (N, K) of their weight by type of device: some milliseconds each.
_SHAPES = {"cpu": (768, 3072)}
_SHAPE = (3072, 3072)
REPEATS = 2

_LOCK = threading.Lock()


class Way(NamedTuple):
    """A backend, and the int8 digits that it multiplies."""

    backend: Backend
    digits: Digits

    def __str__(self) -> str:
        return f"{self.backend.NAME} {self.digits}"


def fastest(ways: tuple[Way, ...], device: torch.device, rows: int, kind: selfcheck.Kind) -> Way:
    """The fastest of ``ways``, all of which have passed their self-check, for ``rows`` activations on ``device``.

    MLX computes the whole transformer where it is first, so on its device the order stands.
    """
    if len(ways) == 1 or device.type == "mps":
        return ways[0]
    with _LOCK:
        times = _times(ways, device, kind)[0 if rows <= FEW else 1]
    return min(ways, key=lambda way: times[str(way)])


@functools.cache
def _times(ways: tuple[Way, ...], device: torch.device, kind: selfcheck.Kind) -> list[dict[str, float]]:
    """Way -> milliseconds, for each of :data:`ROWS`."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)() if device.type == "cuda" else 0
    here = (f"{device_name(device)}, driver {driver}, torch {torch.__version__}, triton {libraries.version('triton')}, "
            f"bonsai-image {__version__}")
    dtypes = f"{kind.dtype}, scales {kind.scale_dtype}".replace("torch.", "")
    what = f"{kind.bits} bits, {kind.form}, groups of {kind.group}, {dtypes}: {', '.join(map(str, ways))}"
    path = Path(os.environ[FILE]) if os.environ.get(FILE) else None
    # One process measures, the others wait for what it finds: the workers of a run must make the same images.
    with alone(path.with_suffix(".lock")) if path else contextlib.nullcontext():
        kept = _read(path)
        machine = kept[here] if isinstance(kept.get(here), dict) else {}
        with contextlib.suppress(LookupError, TypeError, ValueError):
            few, many = machine[what]
            return [{str(way): float(times[str(way)]) for way in ways} for times in (few, many)]
        measured = []
        for rows in ROWS:
            example = selfcheck.example(kind, rows, *_SHAPES.get(device.type, _SHAPE), device)
            measured.append(milliseconds({str(way): functools.partial(way.backend.multiply, *example, way.digits)
                                          for way in ways}, device))
        if path is not None:
            with contextlib.suppress(OSError):
                write_whole(path, json.dumps(kept | {here: machine | {what: measured}}, indent=1).encode())
    return measured


def _read(path: Path | None) -> dict[str, Any]:
    """What is kept; nothing where there is no file, or another one than ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path is not None and isinstance(kept := json.loads(path.read_bytes()), dict):
            return kept
    return {}


@torch.inference_mode()
@torch.autocast("cpu", enabled=False)
def milliseconds(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The best of some calls of each in turn, after one to warm up. What fails takes forever; running out of memory is
    raised."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat, (name, call) in itertools.product(range(1 + REPEATS), calls.items()):
        try:
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        except libraries.FAILURES as failure:
            if libraries.out_of_memory(failure):
                raise
        else:
            if repeat:
                best[name] = min(best[name], round((time.perf_counter() - start) * 1e3, 4))
    return best
