"""The packed layers as ComfyUI ``operations``: the layers of ``ops`` under the host's own weight management."""

from __future__ import annotations

import comfy.ops
import torch

from ..ops.linear import PackedEmbedding, PackedLinear, embedding, linear
from ..ops.packed import is_packed


class HostLinear(PackedLinear, comfy.ops.CastWeightBiasOp):
    """A Linear that the host offloads, prefetches and interrupts like its own.

    ``compute_dtype`` None means the dtype of the activations. ``side_paths`` add the effect of LoRAs beside the product
    (see ``nodes/lora.py``, which notes in ``attached`` what they were made of; None while the model is not loaded). The
    weight itself, packed or dense, never changes.
    """

    comfy_cast_weights = True
    compute_dtype: torch.dtype | None = None
    side_paths: tuple = ()
    attached: tuple | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        dtype = self.compute_dtype or x.dtype
        functions = self.weight_function
        if functions:
            # The host leaves a LoRA among the weight functions when it offloads a layer: it is a side path already.
            self.weight_function = [function for function in functions if not hasattr(function, "is_lowvram_patch")]
        # Asking for the weight's own dtype keeps it packed; only some other weight function needs it dense.
        packed = is_packed(self.weight) and not self.weight_function
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype if packed else dtype, device=x.device, bias_dtype=dtype,
                offloadable=True, compute_dtype=dtype)
        finally:
            self.weight_function = functions
        x_cast = x.to(dtype)
        result = linear(x_cast, weight, bias, self.backend)
        for path in self.side_paths:
            result = path.add(x_cast, result, weight)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result.to(x.dtype)

    def convert_weight(self, weight: torch.Tensor, **_) -> torch.Tensor:
        """How the host gets a dense weight, to merge it into another model or to extract a LoRA from it."""
        return weight.dequantize() if is_packed(weight) else weight

    def set_weight(self, weight: torch.Tensor, return_weight: bool = False, **_) -> torch.Tensor | None:
        """How the host puts a patched weight back: not at all, its patches are side paths."""
        return weight if return_weight else None


class HostEmbedding(PackedEmbedding, comfy.ops.CastWeightBiasOp):
    """An Embedding under the host's weight management; only the rows that are looked up are ever converted."""

    comfy_cast_weights = True

    def forward(self, indices: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        comfy.ops.run_every_op()
        dtype = out_dtype or self.weight.dtype
        weight, _, stream = comfy.ops.cast_bias_weight(
            self, dtype=dtype if self.weight_function else self.weight.dtype, device=indices.device, bias_dtype=dtype,
            offloadable=True)
        result = embedding(indices, weight, dtype)
        comfy.ops.uncast_bias_weight(self, weight, None, stream)
        return result


def packed_operations(backend: str = "auto", compute_dtype: torch.dtype | None = None) -> type:
    """An ``operations`` class for ``model_options["custom_operations"]``, of its own for each model."""

    class Linear(HostLinear):
        pass

    Linear.backend = backend
    Linear.compute_dtype = compute_dtype

    class PackedOperations(comfy.ops.manual_cast):
        pass

    PackedOperations.Linear = Linear
    PackedOperations.Embedding = HostEmbedding
    return PackedOperations
