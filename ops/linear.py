"""The layers that compute with packed weights, as plain ``torch.nn`` modules.

They are drop-in replacements of ``nn.Linear`` and ``nn.Embedding`` that take whatever weight a state dict brings:
packed or dense. A host adapter subclasses them to add its own weight management.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from . import backends, torch_backend
from .packed import PackedLayout, is_packed, tag


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           backend: str = "auto") -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` of shape ``(..., K)`` and a packed or dense ``weight`` ``(N, K)``.

    Computed in the dtype of ``x``, which the result has, by ``backend`` (see ``ops/backends.py``) where packed.
    """
    if is_packed(weight):
        return backends.linear(x, weight, bias, backend)
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(indices: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``(..., K)`` of a packed or dense table ``(N, K)``, in ``dtype`` (default: the table's)."""
    dtype = dtype or weight.dtype
    if is_packed(weight):
        params = weight._params
        return torch_backend.embedding(indices, weight._qdata, params.scale, params.shift, params.bits, params.form,
                                       dtype)
    return nn.functional.embedding(indices, weight).to(dtype)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    if not is_packed(tensor):
        return nn.Parameter(tensor, requires_grad=False)
    # Hosts use a model in inference mode, but unload it outside. Only a wrapper from inside can be handled in both.
    with torch.inference_mode():
        return nn.Parameter(QuantizedTensor(tensor._qdata, tensor._layout_cls, tensor._params), requires_grad=False)


class PackedModule(nn.Module):
    """Common to the layers below: a ``weight`` that may be packed, and is empty until a state dict brings it.

    Nothing is allocated at construction, so building a model costs no memory on any device. Loading takes the tensors
    of the state dict as they are, without a copy: memory-mapped weights stay memory-mapped.
    """

    def __init__(self, weight_shape: tuple[int, int]):
        super().__init__()
        self.weight_shape = weight_shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif tuple(weight.shape) != self.weight_shape:
            error_msgs.append(f"{prefix}weight: expected shape {self.weight_shape}, found {tuple(weight.shape)}")
        else:
            self.weight = _parameter(weight)
        bias = state_dict.get(f"{prefix}bias")
        if bias is not None:
            self.bias = _parameter(bias)
        known = (f"{prefix}weight", f"{prefix}bias")
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    # Hosts look up every name of a state dict as an attribute.
    @property
    def weight_scale(self) -> torch.Tensor:
        return self.weight._params.scale

    @property
    def weight_shift(self) -> torch.Tensor:
        return self.weight._params.shift

    @property
    def comfy_quant(self) -> torch.Tensor:
        return tag(self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if is_packed(self.weight):
            params = self.weight._params
            for suffix, tensor in PackedLayout.state_dict_tensors(self.weight._qdata, params).items():
                destination[f"{prefix}weight{suffix}"] = tensor
            destination[f"{prefix}comfy_quant"] = self.comfy_quant
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        # nn.Module would assign into param.data, which a QuantizedTensor does not support.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = _parameter(fn(parameter))
        return self


class PackedLinear(PackedModule):
    """``nn.Linear`` over a packed or dense weight ``(out_features, in_features)``."""

    backend: str = "auto"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__((out_features, in_features))
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.backend)


class PackedEmbedding(PackedModule):
    """``nn.Embedding`` over a packed or dense table ``(num_embeddings, embedding_dim)``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None,
                 dtype=None):
        super().__init__((num_embeddings, embedding_dim))
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return embedding(indices, self.weight)
