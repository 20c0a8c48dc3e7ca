"""The checks that every state dict passes before a model is built from it."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..ops.packed import is_packed, parts
from .errors import CHOOSE_UNMODIFIED, DOWNLOAD_AGAIN, DOWNLOAD_FOLDER, ModelFileError
from .files import TensorFile, same_number

#: The floating dtypes that model files hold, and that every backend computes with.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Elements checked at a time.
_RUN = 1 << 20


def _floats(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What is not codes: the tensor itself, or scale and shift of a packed one."""
    if not is_packed(tensor):
        return [tensor]
    return [part for part in parts(tensor)[1:3] if part is not None]


def check_scales(scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Raise ValueError unless both are matrices of one shape and floating dtype."""
    if scale.ndim != 2 or scale.shape != shift.shape or scale.dtype not in FLOATS or scale.dtype != shift.dtype:
        raise ValueError(f"scales {tuple(scale.shape)} in {scale.dtype} beside {tuple(shift.shape)} in {shift.dtype}")


def check_tensors(file: TensorFile, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless ``tensors`` has exactly the names and shapes of ``shapes``, all of them finite."""
    path = file.path
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ModelFileError(path, f"the tensor {missing[0]}", f"none ({len(missing)} of {len(shapes)} missing)",
                             DOWNLOAD_AGAIN)
    surplus = [name for name in tensors if name not in shapes]
    if surplus:
        raise ModelFileError(path, "only the tensors of the model", f"{len(surplus)} more, such as {surplus[0]}",
                             CHOOSE_UNMODIFIED)
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelFileError(path, f"{name} of shape {shape}", f"{tuple(tensor.shape)}", "choose another file")
        for part in _floats(tensor):
            if part.dtype not in FLOATS:
                raise ModelFileError(path, f"{name} in BF16, FP16 or FP32", str(part.dtype).removeprefix("torch."),
                                     "choose another file")
            # In runs: the temporaries of isfinite on a whole layer would add a tenth to the peak memory of loading.
            if not all(bool(torch.isfinite(run).all()) for run in part.flatten().split(_RUN)):
                raise ModelFileError(path, f"finite numbers in {name}", "NaN or infinity", DOWNLOAD_AGAIN)


def check_config(file: TensorFile, known: Mapping[str, Any], fixed: Collection[str] = ()) -> None:
    """Compare the file's ``config.json`` with what is ``known`` of the model.

    Where the tensors decide, they are right and the JSON only earns a warning. The keys in ``fixed`` show in no tensor:
    another value there is another model, and raises ModelFileError.
    """
    for key, value in known.items():
        stated, true = file.config.get(key), list(value) if isinstance(value, tuple) else value
        if stated in (None, true) or (isinstance(true, (int, float)) and same_number(stated, true)):
            continue
        if key in fixed:
            raise ModelFileError(file.path, f"{key} {true} of this model", f"{reprlib.repr(stated)} in config.json",
                                 DOWNLOAD_FOLDER)
        file.warn(f"{key} is {true} in the tensors, and {reprlib.repr(stated)} in config.json")
