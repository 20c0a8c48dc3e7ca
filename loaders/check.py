"""The checks that every state dict passes before a model is built from it."""

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import PackedLayout, is_packed
from .errors import CHOOSE_UNMODIFIED, DOWNLOAD_FOLDER, ModelFileError
from .files import TensorFile

#: The shape of each tensor by name.
Shapes = dict[str, tuple[int, ...]]

#: The floating dtypes that model files hold, and that every backend computes with.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Elements checked at a time.
_RUN = 1 << 20


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of ``pattern`` takes at the start of ``names``."""
    return len({int(match[1]) for name in names if (match := re.match(pattern, name))})


def check_scales(scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Raise ValueError unless both are matrices of one shape and floating dtype."""
    if scale.ndim != 2 or scale.shape != shift.shape or scale.dtype not in FLOATS or scale.dtype != shift.dtype:
        raise ValueError(f"scales {tuple(scale.shape)} in {scale.dtype} beside {tuple(shift.shape)} in {shift.dtype}")


def read_shapes(path: Path, tensors: Mapping[str, torch.Tensor], dimensions: Mapping[str, int], model: str,
                action: str) -> list[tuple[int, ...]]:
    """The shapes of the tensors from which those of all others follow: by name, how many ``dimensions`` they have.

    Raises ModelFileError where one is missing or has others.
    """
    for name, count in dimensions.items():
        if name not in tensors or tensors[name].ndim != count:
            raise ModelFileError(path, f"the tensors of {model}", f"no usable {name}", action)
    return [tuple(tensors[name].shape) for name in dimensions]


def check_tensors(file: TensorFile, tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """Raise ModelFileError unless ``tensors`` has exactly the names and shapes of ``shapes``, all of them finite."""
    path = file.path
    if missing := [name for name in shapes if name not in tensors]:
        raise ModelFileError(path, f"the tensor {missing[0]}", f"none ({len(missing)} of {len(shapes)} missing)")
    if surplus := [name for name in tensors if name not in shapes]:
        raise ModelFileError(path, "only the tensors of the model", f"{len(surplus)} more, such as {surplus[0]}",
                             CHOOSE_UNMODIFIED)
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelFileError(path, f"{name} of shape {shape}", f"{tuple(tensor.shape)}", "choose another file")
        # For a packed weight check scale and shift; every code is valid.
        for part in PackedLayout.get_plain_tensors(tensor)[1:] if is_packed(tensor) else (tensor,):
            if part.dtype not in FLOATS:
                raise ModelFileError(path, f"{name} in BF16, FP16 or FP32", str(part.dtype).removeprefix("torch."),
                                     "choose another file")
            # In runs: the temporaries of isfinite on a whole layer would add a tenth to the peak memory of loading.
            if not all(bool(torch.isfinite(run).all()) for run in part.flatten().split(_RUN)):
                raise ModelFileError(path, f"finite numbers in {name}", "NaN or infinity")


def check_json(file: TensorFile, stated: Any, known: Mapping[str, Any], fixed: Collection[str] = (),
               where: str = "config.json") -> None:
    """Compare ``stated``, which stands in the JSON beside the tensors and may be anything, with what is ``known``.

    Where the tensors show the value they win, and the JSON gets a warning. The keys in ``fixed`` show in no tensor:
    another value there is another model, and raises ModelFileError.
    """
    for key, true in known.items() if isinstance(stated, dict) else ():
        found = stated.get(key)
        if found is None or (_same_number(found, true) if isinstance(true, (int, float)) else found == true):
            continue
        if key in fixed:
            raise ModelFileError(file.path, f"{key} {true} of this model", f"{reprlib.repr(found)} in {where}",
                                 DOWNLOAD_FOLDER)
        file.warn(f"{key} is {true} in the tensors, and {reprlib.repr(found)} in {where}")


def _same_number(stated: Any, true: float) -> bool:
    """Whether ``stated`` means ``true`` in any spelling: 2, 2.0, "2"."""
    try:
        return not isinstance(stated, bool) and float(stated) == true
    except (TypeError, ValueError, OverflowError):
        return False
