"""What a backend is, and what it computes with int8 activations: the contract that every one of them keeps."""

from collections.abc import Hashable
from typing import Literal, NamedTuple, Protocol

import torch

from ..packed import Packed, dequantize
from .libraries import Library

#: How many int8 digits of an activation are multiplied. 0: none, activations keep their dtype.
Digits = Literal[0, 1, 2, "adaptive"]
#: How a choice is shown.
_WORDS: dict[Digits, str] = {0: "", 1: " with one int8 digit", 2: " with two int8 digits",
                             "adaptive": " with int8 activations"}

#: The largest activation in two digits: 127 * 128.
LARGEST = 16256.0
#: A group whose largest activation is below this counts as zeros: dividing by it could overflow.
SMALLEST = 2.0**-100
#: Where "adaptive" takes the second digit. One digit has 7e-3 of error where the largest of a group is 2.7 times the
#: rms of its row (Gaussian activations), and in proportion elsewhere. Of 128 Gaussians one in 14,000 exceeds 5 times.
OUTLYING = 5.0


class Backend(Hashable, Protocol):
    """A module, or any object, that multiplies packed weights.

    To add one, write a module with these names, and add it to ``backends.BACKENDS``.
    """

    #: What users choose it by.
    NAME: str
    #: The torch device types that it runs on; empty: all.
    DEVICES: tuple[str, ...]
    #: What it is built on.
    LIBRARY: Library

    def problem(self, device: torch.device | None, digits: Digits = 0) -> str | None:
        """Why it cannot be used on ``device`` with such activations; None if it can.

        One sentence without its full stop. With no ``device``, only what is installed is judged.
        """

    def serves(self, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits,
               named: bool) -> bool:
        """Whether it takes the product of ``rows`` activations of ``dtype`` with ``packed``. Waits for no device.

        With ``named``, the user chose this backend: it takes all that it can, otherwise what it is the fastest for.
        """

    def multiply(self, x: torch.Tensor, packed: Packed, digits: Digits) -> torch.Tensor:
        """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1; ``(M, N)`` in the dtype of ``x``.

        With digits, as :func:`int8_product` defines it; else exact up to the rounding of the dtype.
        """


class Choice(NamedTuple):
    """A way to multiply: the backend, the int8 digits of an activation, and why nothing better or named does."""

    backend: Backend
    digits: Digits
    reason: str = ""

    def __str__(self) -> str:
        return self.backend.NAME + _WORDS[self.digits]


def int8_product(x: torch.Tensor, packed: Packed, digits: Digits) -> torch.Tensor:
    """``x @ W.T`` with int8 ``digits`` for ``x`` ``(M, K)``; float32 ``(M, N)``.

    The definition of what a backend computes with digits, in plain torch, slow but on any device. A weight of any form
    is ``W[n, k] = scale[n, g] * level[n, k] + shift[n, g]`` with ``g = k // group`` and integer levels, and an
    activation ``x[m, k] ~ v[m, k] * step[m, g]`` (:func:`quantize`) with ``v = 128 * high + low``::

        out[m, n] = sum_g step[m, g] * (scale[n, g] * sum_{k in g} v[m, k] * level[n, k]
                                        + shift[n, g] * sum_{k in g} v[m, k])

    The inner sums are exact in int32, the outer one is float32. The rounding of the activations is the whole error,
    relative to the result: two digits 2e-4 or less, one digit 7e-3 of Gaussian activations and 2e-2 of some with a few
    large columns, "adaptive" 8e-3 or less of either (``benchmarks/int8_error.py``).
    """
    scale, shift, groups = packed.scale.float(), packed.shift, packed.scale.shape[1]
    levels = dequantize(packed._replace(scale=torch.ones_like(scale), shift=shift if shift is None else 0 * scale),
                        torch.float32)
    if shift is not None:
        shift = -scale * shift.float() if packed.form == "zeropoint" else shift.float()
    high, low, step = quantize(x, packed.group, digits)
    total = torch.zeros(x.shape[0], packed.n, dtype=torch.float32, device=x.device)
    v = 128 * high.float() + low.float()
    for g, (left, right) in enumerate(zip(v.chunk(groups, 1), levels.chunk(groups, 1), strict=True)):
        # Float32 holds the sums exactly: 16256 * 8 * 128 < 2**24.
        total += left @ right.t() * step[:, g, None] * scale[:, g]
        if shift is not None:
            total += left.sum(1, keepdim=True) * step[:, g, None] * shift[:, g]
    return total


def quantize(x: torch.Tensor, group: int, digits: Digits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x`` ``(M, K)`` -> int8 ``high`` and ``low`` ``(M, K)`` and float32 ``step`` ``(M, K / group)``.

    ``x ~ (128 * high + low) * step``, with ``high`` in -127 .. 127 and ``low`` in -64 .. 63::

        step = amax / 16256                                       amax: the largest magnitude of the row in the group
        128 * high + low = round(x / step)                        two digits, half to even
        high = round(x / (128 * step)), low = 0                   one digit

    "adaptive" takes two where ``amax`` exceeds :data:`OUTLYING` times the root mean square of the whole row. Nothing
    but the row decides, so the result does not depend on what else is in the batch.
    """
    values = x.float().unflatten(1, (-1, group))
    amax = values.abs().amax(2, keepdim=True)
    rms = values.square().mean((1, 2), keepdim=True).sqrt()
    two = amax > OUTLYING * rms if digits == "adaptive" else torch.full_like(amax, digits == 2, dtype=torch.bool)
    # A number divided by a tensor would be computed as a reciprocal and a product, rounded twice.
    inverse = torch.where(amax > SMALLEST, torch.full_like(amax, LARGEST) / amax, 0.0)
    one = 128 * torch.round(values * (inverse / 128))
    v = torch.where(two, torch.round(values * inverse), one).to(torch.int32).flatten(1)
    high = (v + 64) >> 7
    return high.to(torch.int8), (v - (high << 7)).to(torch.int8), amax[..., 0] / LARGEST
