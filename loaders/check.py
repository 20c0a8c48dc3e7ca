"""The checks that every state dict passes before a model is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..ops.packed import PackedLayout, is_packed
from .errors import DOWNLOAD_AGAIN, ModelFileError

#: The floating dtypes that packs hold, and that every backend computes with.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Elements checked at a time.
_RUN = 1 << 20


def _plain(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return PackedLayout.get_plain_tensors(tensor)[1:] if is_packed(tensor) else (tensor,)


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless ``tensors`` has exactly the names and shapes of ``shapes``, all of them finite."""
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ModelFileError(path, f"the tensor {missing[0]}", f"none ({len(missing)} of {len(shapes)} missing)",
                             DOWNLOAD_AGAIN)
    surplus = [name for name in tensors if name not in shapes]
    if surplus:
        raise ModelFileError(path, "only the tensors of the model", f"{len(surplus)} more, such as {surplus[0]}",
                             "choose an unmodified file")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelFileError(path, f"{name} of shape {shape}", f"{tuple(tensor.shape)}", "choose another file")
        for part in _plain(tensor):
            if part.dtype not in FLOATS:
                raise ModelFileError(path, f"{name} in BF16, FP16 or FP32", str(part.dtype).removeprefix("torch."),
                                     "choose another file")
            # In runs: the temporaries of isfinite on a whole layer would add a tenth to the peak memory of loading.
            if not all(bool(torch.isfinite(run).all()) for run in part.flatten().split(_RUN)):
                raise ModelFileError(path, f"finite numbers in {name}", "NaN or infinity", DOWNLOAD_AGAIN)
