"""The packed weight: one canonical form for every published Bonsai format.

A weight of shape ``(N, K)`` (out features, in features) is held as

``codes``
    uint8 ``(N, K * bits / 8)``. LSB first along K: element ``k`` of a row lies in byte ``k * bits // 8``,
    shifted up by ``k * bits % 8``. ``bits`` is 1, 2 or 4. MLX stores exactly these bytes, read as uint32 words.
``scale``
    ``(N, K / group)`` in the floating dtype of the source file; ``group`` divides K (Bonsai: 128 for the diffusion
    model, 64 for the text encoder).
``shift``
    ``(N, K / group)`` in a floating dtype, or None for the symmetric form.

Dequantisation, with ``c = codes[n, k]``, ``s = scale[n, k // group]`` and ``z = shift[n, k // group]``:

=============  ==================================  ======================================================
form           W[n, k]                             written by
=============  ==================================  ======================================================
``symmetric``  ``s * (step * c - origin)``          Bonsai diffusion models (``torch_backend.LEVELS``)
``affine``     ``s * c + z``                        MLX (``biases``), GemLite with ``W_group_mode`` 4
``zeropoint``  ``s * (c - z)``                      HQQ (``zero``), GemLite with ``W_group_mode`` 3
=============  ==================================  ======================================================

``affine`` and ``zeropoint`` are both kept because neither converts to the other without rounding.

The three tensors travel in a comfy-kitchen ``QuantizedTensor`` with :class:`PackedLayout`, so a host moves, clones,
counts, saves and offloads a packed weight like any other parameter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from . import torch_backend

Form = Literal["symmetric", "affine", "zeropoint"]

LAYOUT_NAME = "BonsaiPackedLayout"

#: The format name in the ``comfy_quant`` tag of a saved layer.
FORMAT_NAME = "bonsai_packed"


@dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """What turns ``codes`` into a weight. ``orig_dtype`` is the dtype the weight presents to the host."""

    bits: int = 2
    form: Form = "symmetric"
    shift: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """Number of consecutive elements along K that share one scale."""
        return self.orig_shape[1] // self.scale.shape[1]

    def _tensor_fields(self) -> list[str]:
        return ["scale"] if self.shift is None else ["scale", "shift"]

    def _validate_tensor_fields(self):
        if self.bits not in (1, 2, 4):
            raise ValueError(f"bits must be 1, 2 or 4, got {self.bits}")
        if (self.shift is None) != (self.form == "symmetric"):
            raise ValueError(f"form {self.form!r} {'needs' if self.shift is None else 'takes no'} shift tensor")


class PackedLayout(QuantizedLayout):
    """comfy-kitchen layout over the canonical form. Registered under :data:`LAYOUT_NAME`."""

    Params = PackedParams

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError(
            "Bonsai weights cannot be made from floating-point ones without changing the model; "
            "load a packed file, or keep the changed layer dense."
        )

    @classmethod
    def dequantize(cls, qdata, params):
        return torch_backend.dequantize(qdata, params.scale, params.shift, params.bits, params.form, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Suffix -> tensor; the tag makes the file self-describing."""
        tensors = {"": qdata, "_scale": params.scale}
        if params.shift is not None:
            tensors["_shift"] = params.shift
        return tensors


register_layout_class(LAYOUT_NAME, PackedLayout)


def packed_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    form: Form = "symmetric",
    shift: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """Wrap canonical tensors (see the module docstring) as one weight of shape ``(N, K)`` and apparent ``dtype``.

    Raises ValueError when the shapes do not fit together.
    """
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    if codes.dtype != torch.uint8 or scale.ndim != 2 or scale.shape[0] != n or k % scale.shape[1]:
        raise ValueError(
            f"codes {codes.dtype} {tuple(codes.shape)} at {bits} bits do not fit scales of shape {tuple(scale.shape)}"
        )
    if shift is not None and shift.shape != scale.shape:
        raise ValueError(f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} differ in shape")
    params = PackedParams(scale=scale, orig_dtype=dtype, orig_shape=(n, k), bits=bits, form=form, shift=shift)
    return QuantizedTensor(codes, LAYOUT_NAME, params)


def is_packed(tensor: torch.Tensor | None) -> bool:
    """Whether ``tensor`` is a weight in the canonical packed form."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def packed_nbytes(tensor: QuantizedTensor) -> int:
    """Bytes of codes, scales and shifts (``QuantizedTensor.nbytes`` counts the codes alone)."""
    return sum(part.nbytes for part in PackedLayout.get_plain_tensors(tensor))


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two packed weights have identical codes, and scales and shifts of identical value in any dtype."""
    pa, pb = a._params, b._params
    if (pa.bits, pa.form, pa.orig_shape) != (pb.bits, pb.form, pb.orig_shape):
        return False
    parts = zip(PackedLayout.get_plain_tensors(a), PackedLayout.get_plain_tensors(b), strict=True)
    return all(torch.equal(x, y if x.dtype == y.dtype else y.to(x.dtype)) and torch.equal(x.to(y.dtype), y)
               for x, y in parts)


def tag(weight: QuantizedTensor, **extra) -> torch.Tensor:
    """The ``comfy_quant`` tensor (uint8 JSON) that describes one saved layer."""
    params = weight._params
    conf = {"format": FORMAT_NAME, "bits": params.bits, "group_size": params.group, "form": params.form, **extra}
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
