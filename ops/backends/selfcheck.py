"""What a backend must get right before it is used: one small product, the same for all of them.

The check runs when a backend is about to multiply a kind of weight for the first time in a process. A backend that
fails it, or later fails in a product, is not used for that kind again; the next one takes over.
"""

import threading
from typing import NamedTuple

import torch

from ..packed import Form, Packed, dequantize
from . import libraries
from .interface import Backend, int8_reference

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


#: (backend, device, kind, fast) -> why that is not used, or None.
_VERDICTS: dict[tuple[Backend, torch.device, Kind, bool], str | None] = {}


def problem(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> str | None:
    """Why ``backend`` may not multiply weights of ``kind`` on ``device``, or None; found out once."""
    key = backend, device, kind, fast
    with _LOCK:
        if key not in _VERDICTS:
            _VERDICTS[key] = _check(*key)
        return _VERDICTS[key]


def exclude(backend: Backend, device: torch.device, kind: Kind, fast: bool, failure: BaseException) -> None:
    """Never again multiply like this: a product failed after the check was passed."""
    what = f"fails in a product of the backend {backend.NAME} on {device}"
    with _LOCK:
        _VERDICTS[backend, device, kind, fast] = libraries.sentence(backend.LIBRARY, failure, what)


def _check(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> str | None:
    what = f"fails the self-check of the backend {backend.NAME} on {device}"
    try:
        error = worst_error(backend, device, kind, fast)
    except libraries.FAILURES as failure:
        if libraries.out_of_memory(failure):
            raise
        return libraries.sentence(backend.LIBRARY, failure, what)
    found = f"{kind.bits} bits, {kind.form}: {error:.1f} times the tolerance"
    return None if error <= 1 else libraries.sentence(backend.LIBRARY, found, what)


@torch.autocast("cpu", enabled=False)
def worst_error(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> float:
    """The error of ``backend`` on one small layer, in units of the tolerance.

    The reference is computed on the CPU, in float64 where it is exact. The tolerance is one rounding of the dtype
    relative to the norm of the result, but at least one of TF32, in which a GPU may be set to multiply FP32, and more
    where FP16 is set to accumulate in FP16. The layer is made of fixed numbers, so the random state of the process is
    not touched.
    """
    bits, form, group, dtype, scale_dtype = kind
    n, k = 256, 8 * group
    numbers = torch.arange(n * k, dtype=torch.float64, device="cpu")
    codes = (numbers[: n * k * bits // 8] * 37 % 251).to(torch.uint8).view(n, -1)
    scale = (numbers[: n * 8] * 0.7).cos().view(n, 8).to(scale_dtype)
    shift = None if form == "symmetric" else (scale.double() * -(2**bits - 1) / 2).to(scale_dtype)
    packed = Packed(codes, scale, shift, bits, form)
    there = Packed(codes.to(device), scale.to(device), None if shift is None else shift.to(device), bits, form)
    tolerance = max(torch.finfo(dtype).eps, 2**-9)
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        tolerance *= 4
    worst = 0.0
    for rows in _ROWS:
        x = (numbers[: rows * k] * 0.37).sin().view(rows, k).to(dtype)
        expected = int8_reference(x, packed) if fast else x.double() @ dequantize(packed, dtype).double().t()
        error = (backend.multiply(x.to(device), there, fast).cpu().double() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(torch.inf)) / tolerance)
    return worst
