"""The packed product as one torch operator, and ``linear`` and ``embedding`` over packed or dense weights.

The backend is chosen inside the operator, so that ``torch.compile`` sees one call whichever is used, and another number
of rows recompiles nothing.
"""

from __future__ import annotations

from typing import cast

import torch

from . import backends
from .backends import AUTO, Setting
from .packed import Form, Packed, dequantize, is_packed, parts


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           setting: Setting = AUTO) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` of shape ``(..., K)`` and a packed or dense ``weight`` ``(N, K)``.

    Computed in the dtype of ``x``, which the result has, by the backend that ``setting`` gives where packed.
    """
    if is_packed(weight):
        return _packed_linear(x, *parts(weight), bias, *setting)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(indices: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``(..., K)`` of a packed or dense table ``(N, K)``, in ``dtype`` (default: the table's)."""
    dtype = dtype or weight.dtype
    if is_packed(weight):
        return dequantize(parts(weight).rows(indices.reshape(-1)), dtype).view(*indices.shape, -1)
    return torch.nn.functional.embedding(indices, weight).to(dtype)


@torch.library.custom_op("bonsai_image::packed_linear", mutates_args=())
def _packed_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, bits: int,
                   form: str, bias: torch.Tensor | None, backend: str, precision: str) -> torch.Tensor:
    packed = Packed(codes, scale, shift, bits, cast(Form, form))
    out = backends.multiply(x.reshape(-1, packed.k), packed, Setting(backend, precision))
    if bias is not None:
        out += bias.to(out.dtype)
    return out.view(*x.shape[:-1], packed.n)


@_packed_linear.register_fake
def _(x, codes, scale, shift, bits, form, bias, backend, precision):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_for_backward(ctx, inputs, output):
    ctx.packed = Packed(*inputs[1:6])


def _backward(ctx, grad):
    """Only the activations have a gradient: the codes are not trainable."""
    return grad @ dequantize(ctx.packed, grad.dtype), *[None] * 8


_packed_linear.register_autograd(_backward, setup_context=_save_for_backward)
