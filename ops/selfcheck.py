"""What a backend is, what it computes with int8 activations, and what it must get right before it is used: one small
product, the same for all of them.

The check runs when a backend is about to multiply a kind of weight for the first time in a process. A backend that
fails it is logged once and not used for that kind; the next one takes over.
"""

import functools
import logging
import threading
from collections.abc import Hashable
from typing import NamedTuple, Protocol

import torch

from .packed import Form, Packed, dequantize

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()

#: Few and many: backends have a kernel for each.
_ROWS = (5, 80)


class Backend(Hashable, Protocol):
    """A module, or any object, that multiplies packed weights.

    To add one, write a module with these names, and add it to ``backends.BACKENDS``.
    """

    #: What users choose it by.
    NAME: str
    #: The torch device types that it runs on; empty: all.
    DEVICES: tuple[str, ...]
    #: What to do where it fails its self-check, as half a sentence.
    REMEDY: str

    def problem(self, device: torch.device | None, fast: bool = False) -> str | None:
        """Why it cannot be used on ``device``, with int8 activations if ``fast``; None if it can.

        One sentence without its full stop. With no ``device``, only what is installed is judged.
        """

    def serves(self, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, fast: bool,
               named: bool) -> bool:
        """Whether it takes the product of ``rows`` activations of ``dtype`` with ``packed``. Waits for no device.

        With ``named``, the user chose this backend: it takes all that it can, otherwise what it is the fastest for.
        """

    def multiply(self, x: torch.Tensor, packed: Packed, fast: bool) -> torch.Tensor:
        """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1; ``(M, N)`` in the dtype of ``x``.

        With ``fast``, as :func:`int8_reference` defines it; else exact up to the rounding of the dtype.
        """


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


def int8_reference(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``x @ W.T`` with int8 activations for ``x`` ``(M, K)`` and a symmetric weight; float32 ``(M, N)``.

    The definition of what a backend computes with ``fast``, in plain torch, slow but on any device. For
    ``W[n, k] = scale[n, k // group] * level[n, k]``::

        q[m, k] = round(x[m, k] * (127 / amax[m]))                      int8, amax[m] = max over k of |x[m, k]|
        out[m, n] = amax[m] / 127 * sum_g scale[n, g] * sum_{k in g} q[m, k] * level[n, k]

    The inner sum is exact. The outer sum and the two scales are float32.
    """
    groups = packed.scale.shape[1]
    levels = dequantize(packed._replace(scale=torch.ones_like(packed.scale)), torch.float32)
    q, row = quantise_rows(x)
    total = torch.zeros(x.shape[0], packed.n, dtype=torch.float32, device=x.device)
    for g, (left, right) in enumerate(zip(q.float().chunk(groups, 1), levels.chunk(groups, 1), strict=True)):
        # Float32 holds the sums exactly: they are at most 127 * 8 * 128.
        total += (left @ right.t()) * packed.scale[:, g].float()
    return total * row[:, None]


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``(M, K)`` -> int8 ``(M, K)`` and float32 ``(M,)`` with ``x ~ q * row[:, None]``."""
    amax = x.float().abs().amax(1)
    # A number divided by a tensor would be computed as a reciprocal and a product, rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return torch.round(x.float() * inverse[:, None]).to(torch.int8), amax / 127.0
