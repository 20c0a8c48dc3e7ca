"""What a backend must get right before it is used: one small product, the same for all of them.

The check runs when a backend is about to multiply a kind of weight for the first time in a process. A backend that
fails it, or later fails in a product, is not used for that kind again; the next one takes over.
"""

import threading
from typing import NamedTuple

import torch

from ..packed import Form, Packed, dequantize
from . import libraries
from .interface import Backend, Digits, int8_product

_LOCK = threading.Lock()

#: Few and many: backends have a kernel for each.
_ROWS = (5, 80)


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


#: (backend, device, kind, digits) -> why that is not used, or None.
_VERDICTS: dict[tuple[Backend, torch.device, Kind, Digits], str | None] = {}


def problem(backend: Backend, device: torch.device, kind: Kind, digits: Digits) -> str | None:
    """Why ``backend`` may not multiply weights of ``kind`` on ``device``, or None; found out once."""
    key = backend, device, kind, digits
    with _LOCK:
        if key not in _VERDICTS:
            _VERDICTS[key] = _check(*key)
        return _VERDICTS[key]


def exclude(backend: Backend, device: torch.device, kind: Kind, digits: Digits, failure: BaseException) -> None:
    """Never again multiply like this: a product failed after the check was passed."""
    what = f"fails in a product of the backend {backend.NAME} on {device}"
    with _LOCK:
        _VERDICTS[backend, device, kind, digits] = libraries.sentence(backend.LIBRARY, failure, what)


def _check(backend: Backend, device: torch.device, kind: Kind, digits: Digits) -> str | None:
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
    for rows in _ROWS:
        x, packed = example(kind, rows, 256, 8 * kind.group, torch.device("cpu"))
        there = packed._replace(codes=packed.codes.to(device), scale=packed.scale.to(device),
                                shift=None if packed.shift is None else packed.shift.to(device))
        x[:, 3] *= 30  # a second digit in the first group
        expected = (int8_product(x, packed, digits) if digits
                    else x.double() @ dequantize(packed, kind.dtype).double().t())
        error = (backend.multiply(x.to(device), there, digits).cpu().double() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(torch.inf)) / tolerance)
    return worst
