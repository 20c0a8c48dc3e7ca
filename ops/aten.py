"""What torch operators do to a packed weight, beyond those that comfy-kitchen handles.

Rows stay packed: slices, splits and concatenation along dimension 0, and a move to another device and dtype at once.
Arithmetic in place raises, because it would change a decoded copy and be lost. Every other operator gets the dense
weight.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from .packed import PackedLayout, is_packed, rewrap, unwrap

_ATEN: Any = torch.ops.aten
#: Operators that only move rows along dimension 0, and the position of their dimension argument. In inference
#: mode some arrive undecomposed.
_ROW_OPERATORS = {_ATEN.cat.default: 1, _ATEN.slice.Tensor: 1, _ATEN.narrow.default: 1, _ATEN.split.Tensor: 2,
                  _ATEN.split_with_sizes.default: 2, _ATEN.chunk.default: 2}
_IN_PLACE = ("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "addmm_", "lerp_", "pow_", "neg_", "clamp_",
             "fill_", "zero_", "masked_fill_", "index_add_", "index_copy_", "normal_", "uniform_")


def _move_rows(operator: Callable, position: int, _first: Any, args: tuple, kwargs: dict) -> Any:
    """Apply ``operator`` to codes, scales and shifts each: they have the same rows. Weights that are not all packed
    alike, and other dimensions than the first, are dequantized."""
    first, *rest = args
    weights = first if isinstance(first, (list, tuple)) else [first]
    dim = args[position] if len(args) > position else kwargs.get("dim", 0)
    # At least one is packed, or torch would not have asked.
    kinds = {(*unwrap(w)[3:], unwrap(w).group, w.shape[1], w.dtype) if is_packed(w) else None for w in weights}
    if dim not in (0, -2) or len(kinds) > 1:
        return operator(*dequantize_args(args), **dequantize_args(kwargs))
    columns = zip(*map(PackedLayout.get_plain_tensors, weights), strict=True)
    moved = [operator(list(column) if weights is first else column[0], *rest, **kwargs) for column in columns]

    def wrap(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None) -> QuantizedTensor:
        # A view must be an inference tensor exactly when its base is.
        with torch.inference_mode(weights[0].is_inference()):
            return rewrap(unwrap(weights[0])._replace(codes=codes, scale=scale, shift=shift), weights[0].dtype)

    return wrap(*moved) if isinstance(moved[0], torch.Tensor) else [wrap(*piece) for piece in zip(*moved, strict=True)]


for _operator, _position in _ROW_OPERATORS.items():
    register_layout_op(_operator, PackedLayout)(functools.partial(_move_rows, _operator, _position))


@register_layout_op(_ATEN.to.device, PackedLayout)
def _to_device(weight: QuantizedTensor, args: tuple, kwargs: dict) -> torch.Tensor:
    # Two steps that comfy-kitchen knows. Both keep the scales' own dtype, and neither has flags.
    return weight.to(device=args[1]).to(dtype=args[2])


def _refuse(weight: QuantizedTensor, args: tuple, kwargs: dict) -> None:
    raise NotImplementedError("a packed Bonsai weight cannot be changed in place: the result would be lost. "
                              "Dequantize it first, or add the change beside the product, as a LoRA.")


for _packet in (getattr(_ATEN, _name) for _name in _IN_PLACE):
    for _overload in _packet.overloads():
        register_layout_op(getattr(_packet, _overload), PackedLayout)(_refuse)
