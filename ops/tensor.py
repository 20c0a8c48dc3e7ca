"""comfy-kitchen's tensor, which by itself can neither be deep-copied nor pickled, and as the parameter of a module."""

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor


class PackedTensor(QuantizedTensor):
    """A tensor that survives ``copy.deepcopy``, ``pickle`` and ``torch.save``, with its scales in their own dtype."""

    def _copy_with(self, *args, **kwargs) -> QuantizedTensor:
        return _like(super()._copy_with(*args, **kwargs))

    @staticmethod
    def __tensor_unflatten__(*args) -> QuantizedTensor:
        return _like(QuantizedTensor.__tensor_unflatten__(*args))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _made, (self._qdata, self._layout_cls, self._params, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            _, (codes, layout, params, is_parameter) = self.__reduce_ex__(4)
            memo[id(self)] = _made(codes.clone(), layout, params.clone(), is_parameter)
        return memo[id(self)]


# ComfyUI knows by this name what memory it may pin.
PackedTensor.__name__ = "QuantizedTensor"


def _like(made: QuantizedTensor) -> PackedTensor:
    return PackedTensor(made._qdata, made._layout_cls, made._params)


def packed_parameter(weight: QuantizedTensor) -> PackedTensor:
    """``weight``, with shared tensors, as the parameter of a module."""
    return _made(weight._qdata, weight._layout_cls, weight._params, True)


def _made(codes: torch.Tensor, layout: str, params: Any, is_parameter: bool) -> PackedTensor:
    if not is_parameter:
        return PackedTensor(codes, layout, params)
    # Hosts run a model inside inference_mode and unload it outside. A wrapper created inside works in both; one created
    # outside does not.
    with torch.inference_mode():
        wrapper = PackedTensor(codes, layout, params)
    # What nn.Parameter does to a tensor subclass, but for the copy of its scales, which would be inference tensors.
    wrapper._is_param = True
    return wrapper
