"""What torch operators do to a packed weight, beyond those that comfy-kitchen handles.

Rows stay packed: slices, splits and concatenation along dimension 0, and a move to another device and dtype at once.
Arithmetic in place raises, because it would change a decoded copy and be lost. Every other operator gets the dense
weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from .packed import Packed, PackedLayout, is_packed, packed_weight, parts, rewrap

_ATEN = torch.ops.aten
#: Operators that take rows from a tensor, and the position of their dimension argument. Inference mode shows operators
#: that autograd would have decomposed into others.
_ROW_OPERATORS = {_ATEN.slice.Tensor: 1, _ATEN.narrow.default: 1, _ATEN.split.Tensor: 2,
                  _ATEN.split_with_sizes.default: 2, _ATEN.chunk.default: 2}
_IN_PLACE = ("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "addmm_", "baddbmm_", "lerp_", "pow_", "neg_",
             "clamp_", "fill_", "zero_", "masked_fill_", "index_add_", "index_copy_", "normal_", "uniform_")


def _on_dense(operator: Any, args: tuple, kwargs: dict) -> Any:
    return operator(*dequantize_args(args), **dequantize_args(kwargs))


def _take_rows(operator: Any, position: int) -> Callable:
    def handler(weight: QuantizedTensor, args: tuple, kwargs: dict) -> Any:
        dim = args[position] if len(args) > position else kwargs.get("dim", 0)
        if dim not in (0, -2):
            return _on_dense(operator, args, kwargs)
        packed = parts(weight)
        codes, scale, shift = (None if part is None else operator(part, *args[1:], **kwargs) for part in packed[:3])
        if isinstance(codes, torch.Tensor):
            return packed_weight(codes, scale, packed.bits, packed.form, shift, weight.dtype)
        shifts = [None] * len(codes) if shift is None else shift
        return [packed_weight(*pair, packed.bits, packed.form, piece, weight.dtype)
                for *pair, piece in zip(codes, scale, shifts, strict=True)]

    return handler


for _operator, _position in _ROW_OPERATORS.items():
    register_layout_op(_operator, PackedLayout)(_take_rows(_operator, _position))


@register_layout_op(_ATEN.cat.default, PackedLayout)
def _cat(_first: list, args: tuple, kwargs: dict) -> torch.Tensor:
    weights, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    alike = all(map(is_packed, weights)) and len({_kind(weight) for weight in weights}) == 1
    if dim not in (0, -2) or not alike:
        return _on_dense(_ATEN.cat.default, args, kwargs)
    return rewrap(cat_rows([parts(weight) for weight in weights]), weights[0].dtype)


def cat_rows(weights: list[Packed]) -> Packed:
    """The rows of several weights of equal width, bits, form and group, one weight below the other."""
    first = weights[0]
    shift = None if first.shift is None else torch.cat([weight.shift for weight in weights])
    return first._replace(codes=torch.cat([weight.codes for weight in weights]),
                          scale=torch.cat([weight.scale for weight in weights]), shift=shift)


def _kind(weight: QuantizedTensor) -> tuple:
    packed = parts(weight)
    return packed.bits, packed.form, packed.group, packed.k, weight.dtype


@register_layout_op(_ATEN.to.device, PackedLayout)
def _to_device(weight: QuantizedTensor, args: tuple, kwargs: dict) -> torch.Tensor:
    # Two steps that comfy-kitchen knows. Both keep the scales' own dtype.
    _, device, dtype, *flags = args
    return weight.to(device, *flags[:1]).to(dtype=dtype)


def _refuse(weight: QuantizedTensor, args: tuple, kwargs: dict) -> None:
    raise NotImplementedError("a packed Bonsai weight cannot be changed in place: the result would be lost. "
                              "Dequantize it first, or add the change beside the product, as a LoRA.")


for _name in _IN_PLACE:
    for _overload in getattr(_ATEN, _name).overloads():
        register_layout_op(getattr(getattr(_ATEN, _name), _overload), PackedLayout)(_refuse)
