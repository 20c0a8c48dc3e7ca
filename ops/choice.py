"""Which way to multiply a packed weight on a GPU: pure logic over a card, a number of rows and the weight's form.

The rule, from the bytes and operations of each way (no card is measured yet; ``benchmarks/gpu.py`` prints what to
enter in :data:`GEMLITE_ROWS`):

- A fused kernel reads ``bits / 8`` bytes a weight and unpacks them inside the product. Expanding first costs about 4
  bytes a weight more (write and read a 2-byte copy) and then multiplies at the full speed of the vendor's library.
  With few rows a product is bound by bytes and the fused kernel wins; with many it is bound by operations and loses.
- GemLite has kernels for few rows up to :data:`DEFAULT_GEMLITE_ROWS` and is a general GEMM above, which its author
  measured slower than a dense one. Up to there GemLite, above there expansion, on a card that is not in the table.
- An image never has so few rows: its 512 text tokens alone are more.
- ``int8`` rounds activations, so it serves only where asked for, on NVIDIA cards since Ampere (older ones have no
  int8 matrix kernels in Triton; others are untried), above the same number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Rows up to which GemLite's split-K kernel is made for (its own switch to a plain GEMM).
DEFAULT_GEMLITE_ROWS = 64

#: GemLite reads scales of whole tiles of so many out features, beyond the end of the table if need be.
GEMLITE_COLUMNS = 64

#: GemLite counts the elements of activations and results in 32 bits.
_GEMLITE_ELEMENTS = 2**31

#: Device name as torch reports it -> rows up to which GemLite was measured faster than expansion.
GEMLITE_ROWS: dict[str, int] = {}

#: Groups whose products one int8 matrix instruction or several fill exactly. Bonsai Image has 128.
INT8_GROUPS = (32, 64, 128)

#: What the Triton kernels compute in.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Linux gets Triton with PyTorch, Windows does not.
NO_TRITON = "triton is not installed (pip install triton, on Windows pip install triton-windows)"

_AMPERE = (8, 0)


@dataclass(frozen=True)
class Card:
    """A GPU: ``vendor`` is nvidia, amd or intel; ``capability`` is NVIDIA's, (0, 0) elsewhere."""

    vendor: str
    name: str
    capability: tuple[int, int] = (0, 0)

    @property
    def architecture(self) -> str:
        """NVIDIA's name for the capability."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def candidates(policy: str, card: Card, rows: int, n: int, k: int, dtype: torch.dtype, bits: int, form: str,
               group: int, table: dict[str, int] = GEMLITE_ROWS) -> tuple[str, ...]:
    """The ways to try for ``rows`` times a weight ``(n, k)``, best first; the first that works on this machine serves.
    The last is always ``torch``, which works everywhere.

    ``policy`` is ``triton`` (the rule above), ``gemlite`` (GemLite for any number of rows) or ``int8``.
    """
    if dtype not in DTYPES or group * bits % 8:
        return ("torch",)
    few = rows <= table.get(card.name, DEFAULT_GEMLITE_ROWS)
    if (policy == "gemlite" or few) and n % GEMLITE_COLUMNS == 0 and rows * max(n, k) < _GEMLITE_ELEMENTS:
        return ("gemlite", "triton", "torch")
    if policy == "int8" and form == "symmetric" and group in INT8_GROUPS:
        return ("int8", "triton", "torch")
    return ("triton", "torch")


def int8_refusal(card: Card) -> str | None:
    """Why int8 activations are not served on ``card``, or None."""
    if card.vendor != "nvidia":
        return f"int8 activations are untried on {card.name}"
    if card.capability < _AMPERE:
        return f"int8 activations need an Ampere card or newer, {card.name} is {card.architecture}"
    return None


def gemlite_refusal(card: Card, gemlite: str | None, triton: str) -> str | None:
    """Why GemLite cannot serve ``card`` with these versions (None: not installed), or None.

    Source: its kernels compile to scalar code on Turing.
    """
    if gemlite is not None and card.vendor != "nvidia":
        return f"gemlite is untried on {card.name}"
    if gemlite is not None and card.capability < _AMPERE:
        return f"gemlite is slow before Ampere, {card.name} is {card.architecture}"
    return gemlite_problem(gemlite, triton)


def gemlite_problem(gemlite: str | None, triton: str | None) -> str | None:
    """Why these versions (None: not installed) of GemLite and Triton cannot serve any card, or None.

    Sources: GemLite 0.5.1 uses what Triton 3.8 removed; 0.6 needs Triton 3.6.
    """
    if gemlite is None:
        return "gemlite is not installed (pip install gemlite, on Windows pip install --no-deps gemlite)"
    if triton is None:
        return NO_TRITON
    old, triton_release = _release(gemlite) < (0, 6), _release(triton)
    if old and triton_release >= (3, 8):
        return f"gemlite {gemlite} does not work with triton {triton}; update it (pip install --upgrade gemlite)"
    if not old and triton_release < (3, 6):
        return f"gemlite {gemlite} needs triton 3.6 or newer, found {triton}; update PyTorch, which brings it"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
