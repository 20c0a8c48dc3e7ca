"""Which backend multiplies a packed weight, and why.

``auto`` takes the first in the order of :data:`BACKENDS` that can be used and is the fastest for the product at hand. A
name takes that backend for all that it can multiply, and goes on with the order for the rest. ``fast`` tries int8
activations first, and means exact where no backend has them.
"""

import functools
import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..packed import Packed, is_packed, parts
from . import gemlite_backend, libraries, selfcheck, torch_backend
from .cpu import backend as cpu_backend
from .interface import Backend
from .mlx import backend as mlx_backend
from .triton import backend as triton_backend

#: In order of preference. The last one takes every exact product on every device.
BACKENDS: tuple[Backend, ...] = (gemlite_backend, triton_backend, mlx_backend, cpu_backend, torch_backend)

#: What users choose from.
NAMES = ("auto", *(backend.NAME for backend in reversed(BACKENDS)))

#: ``exact``, or ``fast``: activations rounded to int8 where a backend has a kernel for it.
PRECISIONS = ("exact", "fast")

#: Rows of a typical product: 1024 x 1024 pixels and 512 text tokens.
IMAGE_ROWS = 4608
_LOG = logging.getLogger(__name__)


class Setting(NamedTuple):
    """What a user chose: a name in :data:`NAMES` and one in :data:`PRECISIONS`."""

    backend: str = "auto"
    precision: str = "exact"


#: The fastest exact backend.
AUTO = Setting()


class Choice(NamedTuple):
    """What multiplies: the backend, whether it rounds activations to int8, and why nothing better or named does."""

    backend: Backend
    fast: bool
    reason: str = ""

    def __str__(self) -> str:
        return self.backend.NAME + (" with int8 activations" if self.fast else "")


def problem(name: str) -> str | None:
    """Why what is installed here cannot run the backend ``name`` on any device, or None."""
    return next((_problem(backend, None, False) for backend in BACKENDS if name == backend.NAME), None)


def multiply(x: torch.Tensor, packed: Packed, setting: Setting) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``.

    Where the chosen backend fails in it, the next one multiplies. Running out of memory is raised.
    """
    if not x.shape[0]:
        return x.new_empty(0, packed.n)
    backend, fast, _ = choose(setting, x.device, x.shape[0], packed, x.dtype)
    try:
        return backend.multiply(x, packed, fast)
    except libraries.FAILURES as failure:
        if backend is torch_backend or libraries.out_of_memory(failure):
            raise
        selfcheck.exclude(backend, x.device, selfcheck.kind(packed, x.dtype), fast, failure)
    return multiply(x, packed, setting)


def choices(setting: Setting, device: torch.device, tensors: Iterable[torch.Tensor],
            dtype: torch.dtype) -> Counter[tuple[int, int, Choice]]:
    """How many of ``tensors`` are packed in so many bits and groups of so many, and what multiplies an image's
    activations of ``dtype`` with them."""
    return Counter((weight.bits, weight.group, choose(setting, device, IMAGE_ROWS, weight, dtype))
                   for weight in map(parts, filter(is_packed, tensors)))


def only(name: str, setting: Setting, device: torch.device, tensors: Iterable[torch.Tensor],
         dtype: torch.dtype) -> bool:
    """Whether all :func:`choices` are the backend ``name``, and there is one. Checks nothing where it does not run."""
    return any(name == backend.NAME and device.type in backend.DEVICES for backend in BACKENDS) and {
        choice.backend.NAME for *_, choice in choices(setting, device, tensors, dtype)} == {name}


def choose(setting: Setting, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype) -> Choice:
    """What multiplies ``rows`` activations of ``dtype`` with ``packed``: the first in order that takes the product, can
    be used, and has passed its self-check, which runs now if need be. Why others were passed over is logged once."""
    kind, reasons = selfcheck.kind(packed, dtype), {}
    precisions = (True, False) if setting.precision == "fast" else (False,)
    named = [backend for backend in BACKENDS if setting.backend == backend.NAME]
    for backend, fast, by_name in (*((backend, fast, True) for backend in named for fast in precisions),
                                   *((backend, fast, False) for fast in precisions for backend in BACKENDS)):
        if backend.DEVICES and device.type not in backend.DEVICES:
            if by_name:
                reasons[f"the backend {backend.NAME} does not run on {device.type}"] = logging.INFO
        elif not backend.serves(device, rows, packed, dtype, fast, by_name):
            if by_name and not fast:
                reasons[f"the backend {backend.NAME} does not multiply {packed.bits} bits ({packed.form}, groups of "
                        f"{packed.group}) with {rows} rows of {dtype}".replace("torch.", "")] = logging.INFO
        elif found := _problem(backend, device, fast):
            reasons[found] = logging.INFO
        elif backend is not torch_backend and (found := selfcheck.problem(backend, device, kind, fast)):
            reasons[found] = logging.WARNING
        else:
            break
    for reason, level in reasons.items():
        _log(level, reason, Choice(backend, fast), device)
    return Choice(backend, fast, "; ".join((*reasons, *["fast means exact here"] * (precisions[0] and not fast))))


@functools.cache
def _problem(backend: Backend, device: torch.device | None, fast: bool) -> str | None:
    return backend.problem(device, fast)


@functools.cache
def _log(level: int, reason: str, choice: Choice, device: torch.device) -> None:
    _LOG.log(level, "Bonsai Image: %s; %s multiplies packed weights on %s.", reason, choice, device)
