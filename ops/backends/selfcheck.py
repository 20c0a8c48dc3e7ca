"""What a backend must get right before it is used: one small product, the same for all of them.

The check runs when a backend is about to multiply a kind of weight for the first time in a process. A backend that
fails it is logged once and not used for that kind; the next one takes over.
"""

import functools
import logging
import threading
from typing import NamedTuple

import torch

from ..packed import Form, Packed, dequantize
from .interface import Backend, int8_reference

_LOG = logging.getLogger(__name__)
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


def passes(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> bool:
    """Whether ``backend`` multiplies weights of ``kind`` correctly on ``device``; found out once, logged if not."""
    with _LOCK:
        return _passes(backend, device, kind, fast)


@functools.cache
def _passes(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> bool:
    try:
        error = worst_error(backend, device, kind, fast)
    except Exception as failure:
        # Any compiler or driver error falls through to the next backend. Out of memory is re-raised: it says nothing
        # about the backend. Triton raises it as a plain RuntimeError.
        if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in str(failure).lower():
            raise
        found = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
    else:
        if error <= 1:
            return True
        found = f"{kind.bits} bits, {kind.form}: {error:.1f} times the tolerance"
    _LOG.warning("Bonsai Image: the backend %s fails its self-check on %s (%s) and is not used. To repair it: %s.",
                 backend.NAME, device, found, backend.REMEDY)
    return False


def worst_error(backend: Backend, device: torch.device, kind: Kind, fast: bool) -> float:
    """The error of ``backend`` on one small layer, in units of the tolerance.

    The tolerance is one rounding of the dtype relative to the norm of the result, but at least one of TF32, in which a
    GPU may be set to multiply FP32, and more where FP16 is set to accumulate in FP16. The layer is made of fixed
    numbers, so the random state of the process is not touched.
    """
    bits, form, group, dtype, scale_dtype = kind
    n, k = 256, 8 * group
    codes = (torch.arange(n * k * bits // 8, device=device) * 37 % 251).to(torch.uint8).view(n, -1)
    scale = (torch.arange(n * 8, device=device) * 0.7).cos().view(n, 8).to(scale_dtype)
    shift = None if form == "symmetric" else (scale.float() * -(2**bits - 1) / 2).to(scale_dtype)
    packed = Packed(codes, scale, shift, bits, form)
    tolerance = max(torch.finfo(dtype).eps, 2**-9)
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        tolerance *= 4
    worst = 0.0
    for rows in _ROWS:
        x = (torch.arange(rows * k, device=device) * 0.37).sin().view(rows, k).to(dtype)
        expected = int8_reference(x, packed) if fast else x.float() @ dequantize(packed, dtype).float().t()
        error = (backend.multiply(x, packed, fast).float() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(torch.inf)) / tolerance)
    return worst
