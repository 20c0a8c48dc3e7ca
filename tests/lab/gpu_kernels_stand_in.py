"""The Triton kernels by their definitions in plain torch, for a pretended GPU: what calls them is the real code."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from bonsai_image.ops import gemlite_backend, triton_backend
from bonsai_image.ops.packed import Packed, dequantize


def _expand(packed: Packed, out):
    return out.copy_(dequantize(packed, out.dtype))


def install() -> None:
    """Let the Triton backend multiply on every pretended GPU."""
    sys.modules["bonsai_image.ops.triton_kernels"] = SimpleNamespace(expand=_expand)
    triton_backend.problem = lambda device, fast=False: None
    gemlite_backend.serves = lambda *_: False
