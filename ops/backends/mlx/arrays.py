"""Torch tensors as MLX arrays and back, and the packed product in MLX. Importing this imports MLX.

Arrays are evaluated as soon as they are made: a lazy array belongs to the stream of the thread that made it and fails
in any other, and hosts load in one thread and sample in another.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import mlx.core as mx
import torch

from ...packed import LEVELS, Packed

DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}

#: What the two libraries raise where one cannot read the other's memory: MLX before 0.32 or torch before 2.12 (no
#: Metal DLPack), or a tensor that is not in Metal memory.
_NOT_SHARED = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


class PackedArrays(NamedTuple):
    """A packed weight ``(N, K)`` in MLX: ``w = scales * code + biases``.

    ``words`` uint32 ``(N, K * bits / 32)``; ``scales`` and ``biases`` ``(N, K / group)`` in the activation dtype (in
    mixed dtypes MLX would compute in float32).
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group: int


def to_mlx(tensors: Sequence[torch.Tensor]) -> list[mx.array]:
    """The one crossing from torch to MLX: evaluated arrays of the same shapes and dtypes.

    Tensors in Metal memory are shared, all others copied. Neither library waits for the other, so torch's queue is
    drained here before MLX reads.
    """
    if any(tensor.device.type == "mps" for tensor in tensors):
        torch.mps.synchronize()
    arrays = [_array(tensor.detach().contiguous()) for tensor in tensors]
    mx.eval(arrays)
    return arrays


def _array(tensor: torch.Tensor) -> mx.array:
    if tensor.device.type != "cpu":
        with suppress(*_NOT_SHARED):
            return mx.asarray(tensor, copy=False)
    # Through the CPU: copying straight from Metal memory can hang in MLX before 0.32.4.
    return mx.array(tensor.cpu())


def to_torch(array: mx.array, like: torch.Tensor) -> torch.Tensor:
    """The one crossing from MLX to torch: ``array`` on the device and in the dtype of ``like``."""
    array = mx.contiguous(array.astype(DTYPES[like.dtype]))
    mx.eval(array)
    try:
        tensor = torch.from_dlpack(array)
    except _NOT_SHARED:
        tensor = torch.frombuffer(memoryview(array), dtype=like.dtype).view(array.shape)
    return tensor.to(like.device)


def weight_arrays(weights: Sequence[Packed | torch.Tensor], dtype: torch.dtype) -> list[PackedArrays | mx.array]:
    """Packed and dense weights in MLX, for activations of ``dtype``; packed ones must satisfy ``backend.takes``.

    Where memory is shared, all that is new is ``biases`` of a symmetric weight, and ``scales`` in another dtype than
    the file's. A dense weight keeps its dtype.
    """
    tensors = [part for weight in weights for part in (weight[:3] if isinstance(weight, Packed) else (weight,))]
    arrays = iter(to_mlx([tensor for tensor in tensors if tensor is not None]))
    result = [_packed(weight, arrays, DTYPES[dtype]) if isinstance(weight, Packed) else next(arrays)
              for weight in weights]
    mx.eval(result)
    return result


def _packed(weight: Packed, arrays: Iterator[mx.array], dtype: mx.Dtype) -> PackedArrays:
    codes, scale = next(arrays), next(arrays)
    if weight.shift is not None:
        biases = next(arrays)
    else:
        step, origin = LEVELS[weight.bits]  # powers of two: the products are exact
        biases = scale * -origin
        scale = scale if step == 1 else scale * step
    return PackedArrays(codes.view(mx.uint32), scale.astype(dtype), biases.astype(dtype), weight.bits, weight.group)


def product(x: mx.array, weight: PackedArrays | mx.array) -> mx.array:
    """``x @ weight.T`` for ``x`` ``(..., K)`` in the dtype of ``x``."""
    if isinstance(weight, PackedArrays):
        return mx.quantized_matmul(x, *weight[:3], transpose=True, group_size=weight.group, bits=weight.bits)
    return x @ weight.astype(x.dtype).T


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)`` between torch tensors.

    Nothing is kept between calls: where memory is shared, making the arrays costs a table of ``N * K / group`` values.
    """
    # The activations go along like a dense weight: one crossing.
    rows, weight = weight_arrays([x, packed], x.dtype)
    return to_torch(product(rows, weight), x)
