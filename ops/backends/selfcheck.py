"""What is found out on this machine before a backend is used: whether it is right, and how fast it is.

The check is one small product, the same for all backends, when one is about to multiply a kind of weight for the first
time in a process. A backend that fails it, or later fails in a product, is not used for that kind again; the next one
takes over.

The times are measured once and kept in a file of JSON, device -> kind of product -> way -> milliseconds. Hosts name it
in the environment variable :data:`FILE`, which the processes that they start inherit. Deleted, it is measured again;
without one, or where it cannot be written, the times are kept for the process.
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
from ..packed import Form, Packed, dequantize
from . import libraries
from .interface import Backend, Choice, Digits, int8_product

#: The environment variable with the path of the file.
FILE = "BONSAI_IMAGE_TIMES"

#: Rows of the products that are checked, few and many (backends have a kernel for each), of the two that are timed,
#: and up to how many the first of these stands for.
_CHECKED_ROWS, _TIMED_ROWS, _FEW = (5, 80), (32, 512), 64
#: (N, K) of the weight that is timed, on a CPU and elsewhere: some milliseconds each.
_CPU_SHAPE, _SHAPE = (768, 3072), (3072, 3072)
_REPEATS = 2

_LOCK = threading.Lock()


class Kind(NamedTuple):
    """The weights and activations that one verdict covers."""

    bits: int
    form: Form
    group: int
    dtype: torch.dtype
    scale_dtype: torch.dtype


def kind(packed: Packed, dtype: torch.dtype) -> Kind:
    """The kind of a product."""
    return Kind(packed.bits, packed.form, packed.group, dtype, packed.scale.dtype)


#: (backend, digits, device, kind) -> why that is not used, or None.
_VERDICTS: dict[tuple[Backend, Digits, torch.device, Kind], str | None] = {}


def problem(way: Choice, device: torch.device, kind: Kind) -> str | None:
    """Why weights of ``kind`` may not be multiplied in this ``way`` on ``device``, or None; found out once."""
    key = way.backend, way.digits, device, kind
    with _LOCK:
        if key not in _VERDICTS:
            _VERDICTS[key] = _check(*key)
        return _VERDICTS[key]


def exclude(way: Choice, device: torch.device, kind: Kind, failure: BaseException) -> None:
    """Never again multiply like this: a product failed after the check was passed."""
    what = f"fails in a product of the backend {way.backend.NAME} on {device}"
    with _LOCK:
        _VERDICTS[way.backend, way.digits, device, kind] = libraries.sentence(way.backend.LIBRARY, failure, what)


def _check(backend: Backend, digits: Digits, device: torch.device, kind: Kind) -> str | None:
    what = f"fails the self-check of the backend {backend.NAME} on {device}"
    try:
        error = worst_error(backend, device, kind, digits)
    except libraries.FAILURES as failure:
        if libraries.out_of_memory(failure):
            raise
        return libraries.sentence(backend.LIBRARY, failure, what)
    found = f"{kind.bits} bits, {kind.form}: {error:.1f} times the tolerance"
    return None if error <= 1 else libraries.sentence(backend.LIBRARY, found, what)


def example(kind: Kind, rows: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, Packed]:
    """``rows`` activations and a weight ``(n, k)`` of ``kind``. They are made of fixed numbers, so the random state of
    the process is not touched."""
    bits, form, group, dtype, scale_dtype = kind
    numbers = torch.arange(max(n, rows) * k, dtype=torch.float64, device="cpu")
    codes = (numbers[: n * k * bits // 8] * 37 % 251).to(torch.uint8).view(n, -1)
    scale = (numbers[: n * k // group] * 0.7).cos().view(n, -1).to(scale_dtype)
    shift = None if form == "symmetric" else (scale.double() * -(2**bits - 1) / 2).to(scale_dtype).to(device)
    x = (numbers[: rows * k] * 0.37).sin().view(rows, k).to(dtype)
    return x.to(device), Packed(codes.to(device), scale.to(device), shift, bits, form)


@torch.autocast("cpu", enabled=False)
def worst_error(backend: Backend, device: torch.device, kind: Kind, digits: Digits) -> float:
    """The error of ``backend`` on one small layer, in units of the tolerance.

    The reference is computed on the CPU, in float64 where it is exact. The tolerance is one rounding of the dtype
    relative to the norm of the result, but at least one of TF32, in which a GPU may be set to multiply FP32, and more
    where FP16 is set to accumulate in FP16.
    """
    tolerance = max(torch.finfo(kind.dtype).eps, 2**-9)
    if kind.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        tolerance *= 4
    worst = 0.0
    for rows in _CHECKED_ROWS:
        x, packed = example(kind, rows, 256, 8 * kind.group, torch.device("cpu"))
        there = packed._replace(codes=packed.codes.to(device), scale=packed.scale.to(device),
                                shift=None if packed.shift is None else packed.shift.to(device))
        x[:, 3] *= 30  # a second digit in the first group
        expected = (int8_product(x, packed, digits) if digits
                    else x.double() @ dequantize(packed, kind.dtype).double().t())
        error = (backend.multiply(x.to(device), there, digits).cpu().double() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(torch.inf)) / tolerance)
    return worst


def fastest(ways: tuple[Choice, ...], device: torch.device, rows: int, kind: Kind) -> Choice:
    """The fastest of ``ways``, all of which have passed their self-check, for ``rows`` activations on ``device``.

    MLX computes the whole transformer where it is first, so on its device the order stands.
    """
    if len(ways) == 1 or device.type == "mps":
        return ways[0]
    with _LOCK:
        times = _times(ways, device, kind)[0 if rows <= _FEW else 1]
    return min(ways, key=lambda way: times[str(way)])


@functools.cache
def _times(ways: tuple[Choice, ...], device: torch.device, kind: Kind) -> list[dict[str, float]]:
    """Way -> milliseconds, for each of :data:`_TIMED_ROWS`."""
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
        for rows in _TIMED_ROWS:
            product = example(kind, rows, *(_CPU_SHAPE if device.type == "cpu" else _SHAPE), device)
            measured.append(milliseconds({str(way): functools.partial(way.backend.multiply, *product, way.digits)
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
    for repeat, (name, call) in itertools.product(range(1 + _REPEATS), calls.items()):
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
