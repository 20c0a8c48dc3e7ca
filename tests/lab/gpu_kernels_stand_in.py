"""The Triton kernels by their definitions in plain torch, for a pretended GPU: what calls them is the real code."""

from __future__ import annotations

from bonsai_image.ops import accelerator, choice, int8_reference, torch_backend, triton_backend


def _expand(codes, scale, shift, bits, form, out):
    if form == "levels":
        scale, form = scale.new_ones(scale.shape), "symmetric"
    return out.copy_(torch_backend.dequantize(codes, scale, shift, bits, form, out.dtype))


def install() -> None:
    """Serve every pretended GPU by the Triton backend."""
    triton_backend.expand = _expand
    triton_backend.quantise_rows = int8_reference.quantise_rows
    accelerator.TRITON_INSTALLED = True
    accelerator.card = lambda _device: choice.Card("nvidia", "pretended GPU", (8, 9))
    accelerator.candidates = lambda policy, *_: ("triton", "torch")
