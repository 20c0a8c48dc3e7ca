"""Packed products on GPUs that Triton serves: one operator, inside which the way is chosen (``ops/choice.py``).

The choice is inside, so that ``torch.compile`` sees one call whatever serves, and a new number of rows recompiles
nothing. Each way checks one small layer against the reference before it first serves a kind of weight; what fails
is named once in the log, and the next way serves.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import threading

import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import int8_reference, torch_backend
from .choice import NO_TRITON, Card, candidates, gemlite_problem, gemlite_refusal, int8_refusal

#: What this module is asked for: ``triton`` chooses the fastest exact way, ``gemlite`` prefers GemLite for any number
#: of rows, ``int8`` rounds activations to int8.
POLICIES = ("triton", "gemlite", "int8")

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_DEVICE_TYPES = ("cuda", "xpu")
#: Few and many: GemLite has a kernel for each.
_CHECKED_ROWS = (5, 80)
_LOG = logging.getLogger(__name__)
_CHECK_LOCK = threading.Lock()


def serves(device: torch.device) -> bool:
    """Whether ``device`` is a GPU for which Triton is installed. Initialises no device."""
    return TRITON_INSTALLED and device.type in _DEVICE_TYPES


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, policy: str = "triton") -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``(..., K)`` and a packed ``weight`` ``(N, K)``, in the dtype of ``x``."""
    params = weight._params
    return accelerated_linear(x, weight._qdata, params.scale, params.shift, params.bits, params.form, bias, policy)


@torch.library.custom_op("bonsai_image::accelerated_linear", mutates_args=())
def accelerated_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None,
                       bits: int, form: str, bias: torch.Tensor | None, policy: str) -> torch.Tensor:
    """``torch_backend.packed_linear`` on a GPU, by ``policy`` (a name in :data:`POLICIES`)."""
    n, k = codes.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    group = k // scale.shape[1]
    with torch.get_device_module(x.device).device(x.device):
        for way in candidates(policy, card(x.device), rows.shape[0], n, k, x.dtype, bits, form, group):
            if way == "torch" or works(way, x.device, bits, form, group, x.dtype, scale.dtype):
                break
        out = multiply(way, rows, codes, scale, shift, bits, form)
        if bias is not None:
            out += bias.to(out.dtype)
    return out.view(*x.shape[:-1], n)


@accelerated_linear.register_fake
def _(x, codes, scale, shift, bits, form, bias, policy):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_for_backward(ctx, inputs, output):
    _, ctx.codes, ctx.scale, ctx.shift, ctx.bits, ctx.form, _, _ = inputs


def _backward(ctx, grad):
    """Only the activations have a gradient: the codes are not trainable."""
    weight = torch_backend.dequantize(ctx.codes, ctx.scale, ctx.shift, ctx.bits, ctx.form, grad.dtype)
    return grad @ weight, None, None, None, None, None, None, None


accelerated_linear.register_autograd(_backward, setup_context=_save_for_backward)


def multiply(way: str, rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None,
             bits: int, form: str) -> torch.Tensor:
    """``rows @ W.T`` for ``rows`` ``(M, K)`` by one of the ways of ``choice.candidates``; ``(M, N)``."""
    if way == "torch" or rows.shape[0] == 0:
        return torch_backend.packed_linear(rows, codes, scale, shift, bits, form, None)
    codes, scale, shift = codes.contiguous(), scale.contiguous(), None if shift is None else shift.contiguous()
    if way == "gemlite":
        from . import gemlite_backend

        return gemlite_backend.linear(rows, codes, scale, shift, bits, form)
    from . import triton_backend

    out = rows.new_empty(rows.shape[0], codes.shape[0])
    if way == "int8":
        triton_backend.fast(rows, codes, scale, bits, out)
    else:
        triton_backend.exact(rows, codes, scale, shift, bits, form, out)
    return out


@functools.cache
def card(device: torch.device) -> Card:
    """What ``choice`` needs to know of ``device``."""
    if device.type == "xpu":
        return Card("intel", torch.xpu.get_device_name(device))
    name = torch.cuda.get_device_name(device)
    return Card("amd", name) if torch.version.hip else Card("nvidia", name, torch.cuda.get_device_capability(device))


def works(way: str, device: torch.device, bits: int, form: str, group: int, dtype: torch.dtype,
          scale_dtype: torch.dtype) -> bool:
    """Whether ``way`` gives the right result for such weights on ``device``; found out once, and logged if not."""
    with _CHECK_LOCK:
        return _check(way, device, bits, form, group, dtype, scale_dtype)


def _version(name: str) -> str | None:
    """The version of an installed library (Triton is published under several names, but has one), or None."""
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name).__version__ if name == "triton" else importlib.metadata.version(name)


def problem(policy: str) -> str | None:
    """Why what is installed cannot serve ``policy`` (``triton`` or ``gemlite``) on any device, or None."""
    if policy == "gemlite":
        return gemlite_problem(_version("gemlite"), _version("triton"))
    return None if TRITON_INSTALLED else NO_TRITON


@functools.cache
def _refusal(way: str, device: torch.device) -> str | None:
    """Why ``way`` is known not to serve ``device``, logged once, or None."""
    reason = None
    if way == "gemlite":
        reason = gemlite_refusal(card(device), _version("gemlite"), _version("triton"))
    elif way == "int8":
        reason = int8_refusal(card(device))
    if reason is not None:
        _LOG.info("Bonsai Image: %s.", reason)
    return reason


@functools.cache
def _check(way: str, device: torch.device, bits: int, form: str, group: int, dtype: torch.dtype,
           scale_dtype: torch.dtype) -> bool:
    try:
        if _refusal(way, device) is not None:
            return False
        error = self_check(way, device, bits, form, group, dtype, scale_dtype)
    except Exception as failure:
        # Whatever a compiler or a driver throws, the next way must serve; but a full card says nothing about the way,
        # and Triton has no type of its own for it.
        if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in str(failure).lower():
            raise
        _LOG.warning("Bonsai Image: %s failed on %s (%s), another way serves.", way, device,
                     str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__)
        return False
    if error:
        _LOG.warning("Bonsai Image: %s is wrong on %s (%d bits, %s: %.1f times the tolerance), another way serves.",
                     way, device, bits, form, error)
    return not error


def self_check(way: str, device: torch.device, bits: int, form: str, group: int, dtype: torch.dtype,
               scale_dtype: torch.dtype) -> float:
    """0 where ``way`` agrees with the reference on one small layer, else its error in units of the tolerance.

    The tolerance is one rounding of ``dtype`` relative to the norm of the result, and not less than one of TF32, in
    which a card may be set to multiply FP32; more where it is set to add up in FP16. The layer is made of fixed
    numbers: the random state of the process is not touched.
    """
    n, k = 256, 8 * group
    codes = (torch.arange(n * k * bits // 8, device=device) * 37 % 251).to(torch.uint8).view(n, -1)
    scale = (torch.arange(n * 8, device=device) * 0.7).cos().view(n, 8).to(scale_dtype)
    shift = None if form == "symmetric" else (scale.float() * -(2**bits - 1) / 2).to(scale_dtype)
    tolerance = max(torch.finfo(dtype).eps, 2**-9)
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        tolerance *= 4
    worst = 0.0
    for m in _CHECKED_ROWS:
        x = (torch.arange(m * k, device=device) * 0.37).sin().view(m, k).to(dtype)
        if way == "int8":
            expected = int8_reference.fast(x, codes, scale, bits)
        else:
            expected = x.float() @ torch_backend.dequantize(codes, scale, shift, bits, form, dtype).float().t()
        error = (multiply(way, x, codes, scale, shift, bits, form).float() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(torch.inf)) / tolerance)
    return 0.0 if worst <= 1 else worst
