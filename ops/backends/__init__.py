"""Which backend multiplies a packed weight, and why.

Of the ways that a precision allows, and that the device can and does right, the one that measured fastest on this
machine multiplies. A backend that is chosen by name comes before the others for all that it can multiply.
"""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..packed import Packed, is_packed, unwrap
from . import gemlite_backend, libraries, selfcheck, torch_backend
from .cpu import backend as cpu_backend
from .interface import Backend, Choice, Digits
from .mlx import backend as mlx_backend
from .triton import backend as triton_backend

#: In order of preference. The last one takes every exact product on every device.
BACKENDS: tuple[Backend, ...] = (gemlite_backend, triton_backend, mlx_backend, cpu_backend, torch_backend)

#: What users choose from.
NAMES = ("auto", *(backend.NAME for backend in reversed(BACKENDS)))

#: What users may ask for, and the int8 digits of the activations that give it (``interface.int8_product``).
#: ``auto``: at least as near as BF16. ``exact``: within the rounding of the activations' dtype, below which the error
#: of two digits is in 16 bits, but not in 32. ``fast``: an error of about 8e-3 at most.
PRECISIONS: dict[str, tuple[Digits, ...]] = {"auto": (0, 2), "exact": (0, 2), "fast": ("adaptive", 0, 2)}

#: Rows of a typical product: 1024 x 1024 pixels and 512 text tokens.
IMAGE_ROWS = 4608
_LOG = logging.getLogger(__name__)


class Setting(NamedTuple):
    """What a user chose: a name in :data:`NAMES` and one in :data:`PRECISIONS`."""

    backend: str = "auto"
    precision: str = "auto"


#: What hosts take unless the user says otherwise, and what the library does.
AUTO, EXACT = Setting(), Setting("auto", "exact")


def problem(name: str) -> str | None:
    """Why what is installed here cannot run the backend ``name`` on any device, or None."""
    return next((_problem(backend, None, 0) for backend in BACKENDS if name == backend.NAME), None)


def multiply(x: torch.Tensor, packed: Packed, setting: Setting) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``; ``(M, N)`` in the dtype of ``x``.

    Where the chosen backend fails in it, the next one multiplies. Running out of memory is raised.
    """
    if not x.shape[0]:
        return x.new_empty(0, packed.n)
    choice = choose(setting, x.device, x.shape[0], packed, x.dtype)
    try:
        return choice.backend.multiply(x, packed, choice.digits)
    except libraries.FAILURES as failure:
        if choice.backend is torch_backend or libraries.out_of_memory(failure):
            raise
        selfcheck.exclude(choice, x.device, selfcheck.kind(packed, x.dtype), failure)
    return multiply(x, packed, setting)


def choices(setting: Setting, device: torch.device, tensors: Iterable[torch.Tensor],
            dtype: torch.dtype) -> Counter[tuple[int, int, Choice]]:
    """How many of ``tensors`` are packed in so many bits and groups of so many, and what multiplies an image's
    activations of ``dtype`` with them."""
    return Counter((weight.bits, weight.group, choose(setting, device, IMAGE_ROWS, weight, dtype))
                   for weight in map(unwrap, filter(is_packed, tensors)))


def only(name: str, setting: Setting, device: torch.device, tensors: Iterable[torch.Tensor],
         dtype: torch.dtype) -> bool:
    """Whether all :func:`choices` are the backend ``name``, and there is one. Checks nothing where it does not run."""
    return any(name == backend.NAME and device.type in backend.DEVICES for backend in BACKENDS) and {
        choice.backend.NAME for *_, choice in choices(setting, device, tensors, dtype)} == {name}


def choose(setting: Setting, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype) -> Choice:
    """What multiplies ``rows`` activations of ``dtype`` with ``packed``: the fastest of what takes the product, can be
    used, and has passed its self-check. Checks and measures now if need be; logs once why others were passed over."""
    digits = PRECISIONS[setting.precision]
    if setting.precision == "exact" and dtype.itemsize > 2:
        digits = (0,)
    able, reasons = ways(digits, setting.backend, device, rows, packed, dtype)
    way = selfcheck.fastest(able, device, rows, selfcheck.kind(packed, dtype))
    for reason, level in reasons.items():
        _log(level, reason, way, device)
    exact = setting.precision == "fast" and way.digits != "adaptive"
    return way._replace(reason="; ".join((*reasons, *["fast means exact here"] * exact)))


def ways(allowed: tuple[Digits, ...], name: str, device: torch.device, rows: int, packed: Packed,
         dtype: torch.dtype) -> tuple[tuple[Choice, ...], dict[str, int]]:
    """What can multiply so and does it right, best first; only the backend ``name`` where it is one of them. And why
    others cannot, with the level at which to log it."""
    kind, reasons, found = selfcheck.kind(packed, dtype), dict[str, int](), list[Choice]()
    for named in (True, False):
        for digits, backend in itertools.product(allowed, BACKENDS):
            if named and name != backend.NAME:
                continue
            problem, level = None, logging.INFO
            if backend.DEVICES and device.type not in backend.DEVICES:
                problem = f"the backend {name} does not run on {device.type}" if named else ""
            elif not backend.serves(device, rows, packed, dtype, digits, named):
                problem = (f"the backend {name} does not multiply {packed.bits} bits ({packed.form}, groups of "
                           f"{packed.group}) with {rows} rows of {dtype}" if named and not digits else "")
            elif not (problem := _problem(backend, device, digits)) and backend is not torch_backend:
                problem, level = selfcheck.problem(Choice(backend, digits), device, kind), logging.WARNING
            if problem is None:
                found.append(Choice(backend, digits))
            elif problem and (digits != 2 or level == logging.WARNING):  # nobody asked for two digits
                reasons[problem.replace("torch.", "")] = level
        if found:
            break
    return tuple(found), reasons


@functools.cache
def _problem(backend: Backend, device: torch.device | None, digits: Digits) -> str | None:
    return backend.problem(device, digits)


@functools.cache
def _log(level: int, reason: str, choice: Choice, device: torch.device) -> None:
    _LOG.log(level, "Bonsai Image: %s; %s multiplies packed weights on %s.", reason, choice, device)
