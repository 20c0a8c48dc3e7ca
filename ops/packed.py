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

Dequantization, with ``c = codes[n, k]``, ``s = scale[n, k // group]`` and ``z = shift[n, k // group]``:

=============  ==================================  ======================================================
form           W[n, k]                             written by
=============  ==================================  ======================================================
``symmetric``  ``s * (step * c - origin)``          Bonsai diffusion models (:data:`LEVELS`)
``affine``     ``s * c + z``                        MLX (``biases``), GemLite with ``W_group_mode`` 4
``zeropoint``  ``s * (c - z)``                      HQQ (``zero``), GemLite with ``W_group_mode`` 3
=============  ==================================  ======================================================

``affine`` and ``zeropoint`` are both kept because neither converts to the other without rounding.

The tensors travel in a comfy-kitchen ``QuantizedTensor`` with :class:`PackedLayout`, so a host moves, clones, counts,
saves and offloads a packed weight like any other parameter. ``ops/aten.py`` says which further torch operators keep it
packed; all others see the dense weight.
"""

import json
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard, get_args

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from .tensor import PackedTensor

Form = Literal["symmetric", "affine", "zeropoint"]

#: bits -> (step, origin): a symmetric level is ``step * code - origin``. 1 bit: -1, 1. 2 bits: -1, 0, 1 (code 3 is
#: unused by ternary weights and decodes to 2, as it does in MLX and GemLite). 4 bits: -8 .. 7.
LEVELS = {1: (2, 1), 2: (1, 1), 4: (1, 8)}

LAYOUT_NAME = "BonsaiPackedLayout"

#: The format name in the ``comfy_quant`` tag of a saved layer.
FORMAT_NAME = "bonsai_packed"


class Packed(NamedTuple):
    """The parts of one packed weight ``(n, k)``, as defined above."""

    codes: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    bits: int
    form: Form

    @property
    def n(self) -> int:
        """Out features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """In features."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Number of consecutive elements along K that share one scale."""
        return self.k // self.scale.shape[1]

    def rows(self, index: slice | torch.Tensor) -> "Packed":
        """The rows at ``index``: views for a slice, copies for a tensor of indices."""
        shift = None if self.shift is None else self.shift[index]
        return self._replace(codes=self.codes[index], scale=self.scale[index], shift=shift)

    def contiguous(self) -> "Packed":
        """The same weight with contiguous tensors."""
        shift = None if self.shift is None else self.shift.contiguous()
        return self._replace(codes=self.codes.contiguous(), scale=self.scale.contiguous(), shift=shift)


@dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """What turns ``codes`` into a weight. ``orig_dtype`` is the dtype the weight presents to the host."""

    bits: int
    form: Form
    shift: torch.Tensor | None = None

    def _tensor_fields(self) -> list[str]:
        return ["scale"] if self.shift is None else ["scale", "shift"]


class PackedLayout(QuantizedLayout):
    """comfy-kitchen layout over the canonical form. Registered under :data:`LAYOUT_NAME`."""

    Params = PackedParams

    @classmethod
    def quantize(cls, tensor, **kwargs):
        """Raises NotImplementedError: only the model's authors can make codes from a dense weight."""
        raise NotImplementedError("Bonsai weights cannot be made from floating-point ones without changing the model; "
                                  "load a packed file, or keep the changed layer dense.")

    @classmethod
    def dequantize(cls, qdata, params):
        """The dense weight in the dtype that the packed one presents."""
        return dequantize(Packed(qdata, params.scale, params.shift, params.bits, params.form), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Codes, scale and, if there is one, shift."""
        return tuple(tensor for tensor in unwrap(qtensor)[:3] if tensor is not None)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Suffix -> tensor."""
        return {"": qdata, **{f"_{name}": getattr(params, name) for name in params._tensor_fields()}}


register_layout_class(LAYOUT_NAME, PackedLayout)


def packed_weight(codes: torch.Tensor, scale: torch.Tensor, bits: int, form: Form = "symmetric",
                  shift: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Wrap canonical tensors (see the module docstring) as one weight of shape ``(N, K)`` and apparent ``dtype``.

    Raises ValueError where bits or form are unknown, or the tensors do not fit together.
    """
    if bits not in LEVELS:
        raise ValueError(f"bits must be 1, 2 or 4, got {bits}")
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if (shift is None) != (form == "symmetric"):
        raise ValueError(f"the form {form} {'needs a' if shift is None else 'takes no'} shift tensor")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 of two dimensions, got {codes.dtype} {tuple(codes.shape)}")
    shape = (codes.shape[0], codes.shape[1] * 8 // bits)
    if scale.ndim != 2 or scale.shape[0] != shape[0] or not scale.shape[1] or shape[1] % scale.shape[1]:
        raise ValueError(f"codes of {shape[0]} rows of {shape[1]} do not fit scales of shape {tuple(scale.shape)}")
    if shift is not None and shift.shape != scale.shape:
        raise ValueError(f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} differ in shape")
    params = PackedParams(scale=scale, orig_dtype=dtype, orig_shape=shape, bits=bits, form=form, shift=shift)
    return PackedTensor(codes, LAYOUT_NAME, params)


def rewrap(packed: Packed, dtype: torch.dtype) -> QuantizedTensor:
    """The weight of :class:`Packed` parts, with the apparent ``dtype``."""
    return packed_weight(packed.codes, packed.scale, packed.bits, packed.form, packed.shift, dtype)


def is_packed(tensor: torch.Tensor | None) -> TypeGuard[QuantizedTensor]:
    """Whether ``tensor`` is a weight in the canonical packed form."""
    # By name: another copy of this package in the process registers a class of its own under it.
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def unwrap(weight: QuantizedTensor) -> Packed:
    """The parts of a packed weight, shared with it."""
    params = weight._params
    return Packed(weight._qdata, params.scale, params.shift, params.bits, params.form)


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight ``(N, K)`` in ``dtype``.

    A symmetric weight of at most 2 bits is a level in {-1, 0, 1, 2} times its scale: one rounding, that of the scale to
    ``dtype`` (none where the scale is representable there). The others are computed in at least float32 and rounded
    once at the end.
    """
    codes, scale, shift, bits, form = packed
    exact = form == "symmetric" and bits <= 2
    wide = dtype if exact or dtype == torch.float64 else torch.float32
    step, origin = LEVELS[bits] if form == "symmetric" else (1, 0)
    every_byte = torch.arange(256, dtype=torch.uint8, device=codes.device)[:, None]
    values = step * unpack_codes(every_byte, bits).to(wide) - origin
    weight = _look_up(codes, values).view(*scale.shape, -1)
    factor = scale.to(wide)[..., None]
    if shift is None:
        weight.mul_(factor)
    elif form == "affine":
        weight.mul_(factor).add_(shift.to(wide)[..., None])
    else:
        weight.sub_(shift.to(wide)[..., None]).mul_(factor)
    return weight.view(packed.n, -1).to(dtype)


def _look_up(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values[codes]`` for ``values`` ``(256, n)``. On a CPU the n values of a byte are gathered as one word, whatever
    it means as a number: measured 2 to 4 times as fast."""
    word = {8: torch.int64, 16: torch.complex128}.get(values.shape[1] * values.element_size())
    if codes.device.type != "cpu" or word is None:
        return torch.nn.functional.embedding(codes.int(), values)
    words = values.contiguous().view(word).view(1, 256).expand(codes.shape[0], 256)
    return torch.gather(words, 1, codes.long()).view(values.dtype)


def unpack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Canonical codes ``(N, K * bits / 8)`` -> one code an element, uint8 ``(N, K)``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes[..., None] >> shifts) & (2**bits - 1)).view(codes.shape[0], -1)


def pack_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """One code an element, uint8 ``(N, K)`` -> canonical codes. Raises ValueError unless K fills whole bytes and every
    code fits ``bits``."""
    per_byte = 8 // bits
    if values.shape[1] % per_byte:
        raise ValueError(f"{values.shape[1]} codes of {bits} bits do not fill whole bytes")
    if values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"code {int(values.max())} does not fit {bits} bits")
    columns = values.view(values.shape[0], -1, per_byte)
    packed = columns[..., 0].clone()
    for i in range(1, per_byte):
        packed |= columns[..., i] << (bits * i)
    return packed


def packed_nbytes(weight: QuantizedTensor) -> int:
    """Bytes of codes, scales and shifts (``QuantizedTensor.nbytes`` counts the codes alone)."""
    return sum(part.nbytes for part in PackedLayout.get_plain_tensors(weight))


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two packed weights have identical codes, and scales and shifts of identical value in any dtype."""
    if (unwrap(a).bits, unwrap(a).form, a.shape) != (unwrap(b).bits, unwrap(b).form, b.shape):
        return False
    pairs = zip(PackedLayout.get_plain_tensors(a), PackedLayout.get_plain_tensors(b), strict=True)
    return all(torch.equal(x, y.to(x.dtype)) and torch.equal(x.to(y.dtype), y) for x, y in pairs)


def tag(weight: QuantizedTensor, **extra) -> torch.Tensor:
    """The ``comfy_quant`` tensor (uint8 JSON) that describes one saved layer."""
    packed = unwrap(weight)
    conf = {"format": FORMAT_NAME, "bits": packed.bits, "group_size": packed.group, "form": packed.form, **extra}
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
