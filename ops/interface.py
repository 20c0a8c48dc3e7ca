"""What a backend is: a module, or any object, that multiplies packed weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch

from .packed import Packed


class Backend(Hashable, Protocol):
    """To add one, write a module with these names, and add it to ``backends.BACKENDS``."""

    @property
    def NAME(self) -> str:
        """What users choose it by."""

    @property
    def DEVICES(self) -> tuple[str, ...]:
        """The torch device types that it runs on; empty: all."""

    @property
    def REMEDY(self) -> str:
        """What to do where it fails its self-check, as half a sentence."""

    def problem(self, device: torch.device | None, fast: bool = False) -> str | None:
        """Why it cannot be used on ``device``, with int8 activations if ``fast``; None if it can.

        One sentence without its full stop. With no ``device``, only what is installed is judged.
        """

    def serves(self, device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, fast: bool,
               named: bool) -> bool:
        """Whether it takes the product of ``rows`` activations of ``dtype`` with ``packed``. Waits for no device.

        With ``named``, the user chose this backend: it takes all that it can, otherwise what it is the fastest for.
        """

    def multiply(self, x: torch.Tensor, packed: Packed, fast: bool) -> torch.Tensor:
        """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1; ``(M, N)`` in the dtype of ``x``.

        With ``fast``, as ``ops/int8_reference.py`` defines it; else exact up to the rounding of the dtype.
        """
