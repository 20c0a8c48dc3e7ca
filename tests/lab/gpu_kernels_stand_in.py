"""The Triton kernels by their definitions in plain torch, for a pretended GPU: what calls them is the real code."""

import torch

from bonsai_image.ops.backends import gemlite_backend, selfcheck
from bonsai_image.ops.backends.triton import kernels as triton_kernels
from bonsai_image.ops.packed import dequantize


def install() -> None:
    """Multiply on every pretended GPU with the Triton backend."""
    triton_kernels.expand = lambda packed, out: out.copy_(dequantize(packed, out.dtype))
    gemlite_backend.problem = lambda *_: "gemlite does not run on a pretended GPU"


def allocate_only() -> None:
    """Kernels that leave their results as they are, no self-check, which they would not pass, and nothing measured: the
    first of what can multiply does."""
    triton_kernels.expand = lambda packed, out: out
    triton_kernels.quantize = lambda x, group, digits: (
        x.new_empty(1 if digits == 1 else 2, *x.shape, dtype=torch.int8),
        x.new_empty(x.shape[1] // group, len(x), dtype=torch.float32), None)
    triton_kernels.int8_matmul = lambda q, step, second, levels, scale, out, digits: out
    selfcheck.problem = lambda *_: None
    selfcheck.fastest = lambda ways, *_: ways[0]
