"""Which backend multiplies a packed weight, and why.

``auto`` takes the first in the order of :data:`BACKENDS` that can be used and is the fastest for the product at hand. A
name takes that backend for all that it can multiply, and goes on with the order for the rest. ``fast`` tries int8
activations first, and means exact where no backend has them.
"""

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..devices import default_dtype
from ..packed import Packed
from . import gemlite_backend, selfcheck, torch_backend
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
#: A typical weight: ternary, 3072 x 3072.
_TYPICAL = Packed(torch.empty(3072, 768, dtype=torch.uint8, device="meta"),
                  torch.empty(3072, 24, dtype=torch.bfloat16, device="meta"), None, 2, "symmetric")
_LOG = logging.getLogger(__name__)


class Setting(NamedTuple):
    """What a user chose: a name in :data:`NAMES` and one in :data:`PRECISIONS`."""

    backend: str = "auto"
    precision: str = "exact"


#: The fastest exact backend.
AUTO = Setting()


class Choice(NamedTuple):
    """The name of a backend, whether it rounds activations to int8, and why no better choice was possible, if so."""

    backend: str
    fast: bool
    reason: str = ""


def problem(name: str) -> str | None:
    """Why what is installed here cannot run the backend ``name`` on any device, or None."""
    return next((backend.problem(None) for backend in BACKENDS if name == backend.NAME), None)


def resolve(setting: Setting, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The choice for a typical product of ``dtype`` (default: the device's) on ``device``, before any self-check: what
    to show to the user."""
    reasons = []
    for backend, fast, found in _candidates(setting, device, IMAGE_ROWS, _TYPICAL, dtype or default_dtype(device)):
        if found is None:
            if setting.precision == "fast" and not fast:
                reasons.append("fast means exact here")
            return Choice(backend.NAME, fast, "; ".join(dict.fromkeys(reasons)))
        reasons.append(found)
    raise AssertionError("the torch backend takes every product")


def multiply(x: torch.Tensor, packed: Packed, setting: Setting) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``."""
    if not x.shape[0]:
        return x.new_empty(0, packed.n)
    _log_choice(setting, x.device, x.dtype)
    backend, fast = choose(setting, x.device, x.shape[0], packed, x.dtype)
    return backend.multiply(x, packed, fast)


def multiplies(name: str, setting: Setting, device: torch.device, packed: Packed, dtype: torch.dtype) -> bool:
    """Whether the backend ``name`` is the one that multiplies an image's activations with ``packed``.

    No self-check runs where another backend comes first.
    """
    return (name == resolve(setting, device, dtype).backend
            and name == choose(setting, device, IMAGE_ROWS, packed, dtype)[0].NAME)


def choose(setting: Setting, device: torch.device, rows: int, packed: Packed,
           dtype: torch.dtype) -> tuple[Backend, bool]:
    """The backend that multiplies ``rows`` activations with ``packed``, and whether it rounds them to int8.

    The first in order that takes the product, can be used, and has passed its self-check, which runs now if need be.
    """
    kind = selfcheck.Kind(packed.bits, packed.form, packed.group, dtype, packed.scale.dtype)
    # The torch backend takes every product, so there is a first one.
    return next((backend, fast) for backend, fast, found in _candidates(setting, device, rows, packed, dtype)
                if found is None and (backend is torch_backend or selfcheck.passes(backend, device, kind, fast)))


def _candidates(setting: Setting, device: torch.device, rows: int, packed: Packed,
                dtype: torch.dtype) -> Iterator[tuple[Backend, bool, str | None]]:
    """Backends that take the product, best first: each with whether to round activations, and why it cannot be used."""
    precisions = (True, False) if setting.precision == "fast" else (False,)
    named = [backend for backend in BACKENDS if setting.backend == backend.NAME]
    for group in (named, BACKENDS):
        for fast, backend in itertools.product(precisions, group):
            if not backend.DEVICES or device.type in backend.DEVICES:
                if backend.serves(device, rows, packed, dtype, fast, group is named):
                    yield backend, fast, _problem(backend, device, fast)
            elif group is named:
                yield backend, fast, f"the backend {backend.NAME} does not run on {device.type}"


@functools.cache
def _problem(backend: Backend, device: torch.device, fast: bool) -> str | None:
    return backend.problem(device, fast)


@functools.cache
def _log_choice(setting: Setting, device: torch.device, dtype: torch.dtype) -> None:
    choice = resolve(setting, device, dtype)
    if choice.reason:
        _LOG.info("Bonsai Image: %s; %s multiplies packed weights on %s.", choice.reason, choice.backend, device)
