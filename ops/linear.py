"""``linear`` and ``embedding`` over packed or dense weights, as functions and as plain ``torch.nn`` modules.

The packed product is one torch operator. The backend is chosen inside it, so that ``torch.compile`` sees one call
whichever is used, and another number of rows recompiles nothing.

The modules are drop-in replacements of ``nn.Linear`` and ``nn.Embedding`` that take whatever weight a state dict
brings: packed or dense. A host adapter subclasses them to add its own weight management.
"""

from typing import cast

import torch
from torch import nn

from . import backends
from .backends import EXACT, Setting
from .packed import Form, Packed, dequantize, is_packed, tag, unwrap
from .tensor import packed_parameter


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           setting: Setting = EXACT) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` of shape ``(..., K)`` and a packed or dense ``weight`` ``(N, K)``.

    Computed in the dtype of ``x``, which the result has, by the backend that ``setting`` gives where packed.
    """
    if is_packed(weight):
        return _packed_linear(x, *unwrap(weight), bias, *setting)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(indices: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``(..., K)`` of a packed or dense table ``(N, K)``, in ``dtype`` (default: the table's)."""
    dtype = dtype or weight.dtype
    if is_packed(weight):
        return dequantize(unwrap(weight).rows(indices.reshape(-1)), dtype).view(*indices.shape, -1)
    return torch.nn.functional.embedding(indices, weight).to(dtype)


@torch.library.custom_op("bonsai_image::packed_linear", mutates_args=())
def _packed_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, bits: int,
                   form: str, bias: torch.Tensor | None, backend: str, precision: str) -> torch.Tensor:
    packed = Packed(codes, scale, shift, bits, cast(Form, form))
    out = backends.multiply(x.reshape(-1, packed.k), packed, Setting(backend, precision))
    if bias is not None:
        out += bias.to(out.dtype)
    return out.view(*x.shape[:-1], packed.n)


@_packed_linear.register_fake
def _(x, codes, scale, shift, bits, form, bias, backend, precision):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_for_backward(ctx, inputs, output):
    ctx.packed = Packed(*inputs[1:6])


def _backward(ctx, grad):
    """Only the activations have a gradient: the codes are not trainable."""
    return grad @ dequantize(ctx.packed, grad.dtype), *[None] * 8


_packed_linear.register_autograd(_backward, setup_context=_save_for_backward)


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    if is_packed(tensor):
        return packed_parameter(tensor)
    return nn.Parameter(tensor, requires_grad=False)


class PackedModule(nn.Module):
    """Common to the layers below: a ``weight`` that may be packed, and is empty until a state dict brings it.

    Nothing is allocated at construction, so building a model costs no memory on any device. Loading takes the tensors
    of the state dict as they are, without a copy: memory-mapped weights stay memory-mapped.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight_shape: tuple[int, int], bias: bool):
        super().__init__()
        self.weight_shape = weight_shape
        self._names = ("weight", "bias") if bias else ("weight",)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def loaded_weight(self) -> torch.Tensor:
        """The weight. Raises RuntimeError before a state dict has brought one."""
        if self.weight is None:
            raise RuntimeError(f"this {type(self).__name__} has no weight yet; load a state dict first")
        return self.weight

    def extra_repr(self) -> str:
        """Shape, and how the weight is stored."""
        stored = "not loaded" if self.weight is None else str(self.weight.dtype).removeprefix("torch.")
        if is_packed(self.weight):
            packed = unwrap(self.weight)
            stored = f"{packed.bits} bits, {packed.form}, groups of {packed.group}"
        return f"{self.weight_shape[0]}, {self.weight_shape[1]}, bias={'bias' in self._names}, {stored}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        for name in self._names:
            tensor, shape = state_dict.get(f"{prefix}{name}"), self.weight_shape[: 1 if name == "bias" else 2]
            if tensor is None:
                missing_keys.append(f"{prefix}{name}")
            elif tuple(tensor.shape) != shape:
                error_msgs.append(f"{prefix}{name}: expected shape {shape}, found {tuple(tensor.shape)}")
            else:
                setattr(self, name, _parameter(tensor))
        known = [f"{prefix}{name}" for name in self._names]
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    # ComfyUI resolves every key of a state dict with getattr.
    @property
    def weight_scale(self) -> torch.Tensor:
        """The scales of a packed weight."""
        return unwrap(self.loaded_weight()).scale

    @property
    def weight_shift(self) -> torch.Tensor | None:
        """The shifts of a packed weight."""
        return unwrap(self.loaded_weight()).shift

    @property
    def comfy_quant(self) -> torch.Tensor:
        """The tag of a packed weight in a state dict."""
        return tag(self.loaded_weight())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # A packed weight is kept as it is: detaching it would copy its scales.
        super()._save_to_state_dict(destination, prefix, keep_vars or is_packed(self.weight))
        if is_packed(self.weight):
            destination.update(self.weight.state_dict(f"{prefix}weight"))
            destination[f"{prefix}comfy_quant"] = self.comfy_quant

    def _apply(self, fn, recurse=True):
        # nn.Module would assign into param.data, which a QuantizedTensor does not support.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = _parameter(fn(parameter))
        return self


class PackedLinear(PackedModule):
    """``nn.Linear`` over a packed or dense weight ``(out_features, in_features)``, by the backend of ``setting``.

    ``device`` and ``dtype`` are nn.Linear's and have no meaning here: the state dict decides.
    """

    setting = EXACT

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__((out_features, in_features), bias)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` -> ``(..., out_features)`` in the dtype of ``x``."""
        return linear(x, self.loaded_weight(), self.bias, self.setting)


class PackedEmbedding(PackedModule):
    """``nn.Embedding`` over a packed or dense table ``(num_embeddings, embedding_dim)``.

    ``padding_idx`` matters to training alone; ``device`` and ``dtype`` are as in :class:`PackedLinear`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None,
                 dtype=None):
        super().__init__((num_embeddings, embedding_dim), bias=False)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Integer indices ``(...)`` -> rows ``(..., embedding_dim)`` in the dtype of the table."""
        return embedding(indices, self.loaded_weight())
