"""The packed layers as ComfyUI ``operations``: the layers of ``ops`` under the host's own weight management."""

from __future__ import annotations

import comfy.ops
import torch

from ..ops.linear import PackedEmbedding, PackedLinear, embedding, linear
from ..ops.packed import is_packed


class HostLinear(PackedLinear, comfy.ops.CastWeightBiasOp):
    """A Linear that the host offloads, prefetches and interrupts like its own.

    ``compute_dtype`` None means the dtype of the activations.
    """

    comfy_cast_weights = True
    compute_dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        dtype = self.compute_dtype or x.dtype
        # Asking for the weight's own dtype keeps it packed; only a weight function needs it dense.
        packed = is_packed(self.weight) and not self.weight_function
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, dtype=self.weight.dtype if packed else dtype, device=x.device, bias_dtype=dtype, offloadable=True,
            compute_dtype=dtype)
        result = linear(x.to(dtype), weight, bias, self.backend).to(x.dtype)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


class HostEmbedding(PackedEmbedding, comfy.ops.CastWeightBiasOp):
    """An Embedding under the host's weight management; only the rows that are looked up are ever dequantised."""

    comfy_cast_weights = True

    def forward(self, indices: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        comfy.ops.run_every_op()
        dtype = out_dtype or self.weight.dtype
        packed = is_packed(self.weight) and not self.weight_function
        weight, _, stream = comfy.ops.cast_bias_weight(
            self, dtype=self.weight.dtype if packed else dtype, device=indices.device, bias_dtype=dtype,
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
