"""The packed layers as ComfyUI ``operations``: the layers of ``ops`` under ComfyUI's own weight management."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch

from ..ops.backends import EXACT, Setting
from ..ops.linear import PackedEmbedding, PackedLinear, PackedModule, embedding, linear
from ..ops.packed import is_packed
from .side_paths import Adapters


class HostLayer(PackedModule, comfy.ops.CastWeightBiasOp):
    """Common to the layers below: ComfyUI offloads, prefetches, patches and merges their weights.

    ``adapters`` hold the LoRAs of the loaded model (see ``nodes/lora.py``), None while it is not loaded.
    """

    comfy_cast_weights = True
    adapters: Adapters | None = None

    @contextmanager
    def cast(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight and bias on ``device``; ComfyUI gets them back at the end, also after an error.

        The weight keeps its form and dtype, unless another node pack has put a function on it, which gets it dense in
        ``dtype``.
        """
        weight, bias, functions = self.loaded_weight(), self.bias, self.weight_function
        # An offloaded layer also has its LoRA among the functions; it is a side path already, so leave it out here.
        others = [function for function in functions if not hasattr(function, "is_lowvram_patch")]
        resident = weight.device == device and (bias is None or bias.device == device)
        if resident and not others and not self.bias_function:
            # Skip cast_bias_weight: on a CPU it would dequantize a layer that was once on a GPU.
            yield weight, bias
            return
        # One forward runs at a time, and the functions are called before cast_bias_weight returns.
        self.weight_function = others
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=dtype if others else weight.dtype, device=device, bias_dtype=dtype, offloadable=True,
                compute_dtype=dtype)
        finally:
            self.weight_function = functions
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def add_side_paths(self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the effect of the adapters to ``result``, in place (see :class:`SidePath`)."""
        for path in self.adapters.paths if self.adapters else ():
            path.add(x, result, weight)

    def convert_weight(self, weight: torch.Tensor, **_) -> torch.Tensor:
        """How ComfyUI gets a dense weight, to merge it into another model or to extract a LoRA from it."""
        return weight.dequantize() if is_packed(weight) else weight

    def set_weight(self, weight: torch.Tensor, return_weight: bool = False, **_) -> torch.Tensor | None:
        """How ComfyUI puts a patched weight back: not at all, its patches are side paths."""
        return weight if return_weight else None


class HostLinear(HostLayer, PackedLinear):
    """A Linear that ComfyUI offloads, prefetches and interrupts like its own.

    ``compute_dtype`` None means the dtype of the activations. The weight, packed or dense, never changes.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        x_cast = x.to(self.compute_dtype or x.dtype)
        with self.cast(x.device, x_cast.dtype) as (weight, bias):
            result = linear(x_cast, weight, bias, self.setting)
            self.add_side_paths(x_cast, result, weight)
        return result.to(x.dtype)


class HostEmbedding(HostLayer, PackedEmbedding):
    """An Embedding under ComfyUI's weight management; only the rows that are looked up are ever converted."""

    def forward(self, indices: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        comfy.ops.run_every_op()
        dtype = out_dtype or self.loaded_weight().dtype
        with self.cast(indices.device, dtype) as (weight, _):
            rows = embedding(indices, weight, dtype)
            self.add_side_paths(indices, rows, weight)
        return rows


def packed_operations(setting: Setting = EXACT, compute_dtype: torch.dtype | None = None) -> type:
    """An ``operations`` class for ``model_options["custom_operations"]``, of its own for each model."""

    def layer(*args, **kwargs) -> HostLinear:
        # Not a class of its own, which pickle could not find.
        made = HostLinear(*args, **kwargs)
        made.setting, made.compute_dtype = setting, compute_dtype
        return made

    layers = {"Linear": staticmethod(layer), "Embedding": HostEmbedding}
    return type("PackedOperations", (comfy.ops.manual_cast,), layers)
