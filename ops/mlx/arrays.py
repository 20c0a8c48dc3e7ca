"""Torch tensors as MLX arrays and back, and the packed product in MLX. Importing this imports MLX.

Arrays are evaluated as soon as they are made: a lazy array belongs to the stream of the thread that made it and fails
in any other, and hosts load in one thread and sample in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import torch_backend
from ..packed import packed_weight

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
    if tensor.device.type == "cpu":
        return mx.array(tensor)
    try:
        return mx.asarray(tensor, copy=False)
    except _NOT_SHARED:
        # Through the CPU: copying straight from Metal memory can hang in MLX before 0.32.4.
        return mx.array(tensor.cpu())


def to_torch(array: mx.array, like: torch.Tensor) -> torch.Tensor:
    """The one crossing from MLX to torch: ``array`` on the device and in the dtype of ``like``."""
    array = mx.contiguous(array)
    mx.eval(array)
    try:
        tensor = torch.from_dlpack(array)
    except _NOT_SHARED:
        dtype = next(key for key, value in DTYPES.items() if value == array.dtype)
        tensor = torch.frombuffer(memoryview(array), dtype=dtype).view(array.shape)
    return tensor.to(like.device, like.dtype)


def weight_arrays(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> list[PackedArrays | mx.array]:
    """Packed and dense weights in MLX, for activations of ``dtype``; packed ones must satisfy ``backend.serves``.

    Where memory is shared, all that is new is ``biases`` of a symmetric weight, and ``scales`` in another dtype than
    the file's. A dense weight keeps its dtype.
    """
    parts = [_parts(weight) for weight in weights]
    arrays = iter(to_mlx([tensor for group in parts for tensor in group]))
    result = [_weight(weight, [next(arrays) for _ in group], DTYPES[dtype])
              for weight, group in zip(weights, parts, strict=True)]
    mx.eval(result)
    return result


def _parts(weight: torch.Tensor) -> list[torch.Tensor]:
    if not isinstance(weight, QuantizedTensor):
        return [weight]
    params = weight._params
    return [weight._qdata, params.scale, *([] if params.shift is None else [params.shift])]


def _weight(weight: torch.Tensor, arrays: list[mx.array], dtype: mx.Dtype) -> PackedArrays | mx.array:
    if not isinstance(weight, QuantizedTensor):
        return arrays[0]
    codes, scale, *shift = arrays
    params = weight._params
    if shift:
        biases = shift[0]
    else:
        step, origin = torch_backend.LEVELS[params.bits]  # powers of two: the products are exact
        biases = scale * -origin
        scale = scale if step == 1 else scale * step
    return PackedArrays(codes.view(mx.uint32), scale.astype(dtype), biases.astype(dtype), params.bits, params.group)


def product(x: mx.array, weight: PackedArrays | mx.array) -> mx.array:
    """``x @ weight.T`` for ``x`` ``(..., K)`` in the dtype of ``x``."""
    if isinstance(weight, PackedArrays):
        return mx.quantized_matmul(x, weight.words, weight.scales, weight.biases, transpose=True,
                                   group_size=weight.group, bits=weight.bits)
    return x @ weight.astype(x.dtype).T


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` between torch tensors.

    Nothing is kept between calls: where memory is shared, making the arrays costs a table of ``N * K / group`` values.
    """
    (packed,) = weight_arrays([weight], x.dtype)
    rows, *rest = to_mlx([x] if bias is None else [x, bias.to(x.dtype)])
    result = product(rows, packed)
    return to_torch(result + rest[0] if rest else result, x)


def self_check_error() -> str | None:
    """What is wrong with 1024 x 2048 packed products against the torch CPU reference, or None.

    One row takes MLX's vector kernel and 64 rows its matrix kernel, which has been miscompiled on its own. A wrong
    kernel is off by far more than 1 %; MLX may round float32 products to 11 bits (TF32) and BF16 is 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    # On a CPU MLX accumulates half types in half precision, which is no defect of the installation.
    dtypes = (torch.float32, torch.bfloat16) if mx.default_device() == mx.gpu else (torch.float32,)
    for bits in (1, 2, 4):
        codes = torch.randint(0, 256, (1024, 2048 * bits // 8), generator=generator, dtype=torch.uint8)
        scale = torch.rand(1024, 16, generator=generator).add(0.5).bfloat16()
        weight = packed_weight(codes, scale, bits)
        for rows in (1, 64):
            x = torch.randn(rows, 2048, generator=generator).bfloat16().float()
            reference = torch_backend.linear(x, weight, None)
            for dtype in dtypes:
                result = linear(x.to(dtype), weight, None).float()
                error = float((result - reference).norm() / reference.norm())
                if not error < 1e-2:
                    return f"{bits} bits, {rows} rows, {str(dtype).removeprefix('torch.')}: relative error {error:.2g}"
    return None


def clear_cache() -> None:
    """See ``backend.clear_cache``."""
    mx.clear_cache()
