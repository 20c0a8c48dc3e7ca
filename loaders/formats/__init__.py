"""Every format that is read or written. Adding one is one file here and one entry in :data:`FORMATS`."""

import sys
from pathlib import Path

import torch

from ...ops.packed import is_packed, unwrap
from ..check import FLOATS, check_json
from ..errors import ModelFileError, refusing
from ..files import TensorFile
from . import comfy, dense, gemlite, gguf, hqq, mlx
from .interface import Format, Tensors, Writer, host_loader

if sys.byteorder != "little":
    raise ImportError("Bonsai Image files are little-endian; this machine is not")

#: The first that matches reads a file. The order matters for ``dense`` only, which takes any file of floating-point
#: tensors: all others are told by tensors that no other format has.
FORMATS: tuple[Format, ...] = (gemlite.FORMAT, gguf.FORMAT, mlx.FORMAT, comfy.FORMAT, hqq.FORMAT, dense.FORMAT)


def decode(file: TensorFile) -> tuple[str, Tensors]:
    """Format name and canonical tensors of ``file``. Raises ModelFileError, also if it is none of :data:`FORMATS`."""
    for known in FORMATS:
        if known.matches(file):
            if known.only_tensors:
                refuse_other_than_tensors(file)
            with refusing(file.path, f"a sound {known.name} file of Bonsai Image",
                          "download it again, or choose another one", ValueError):
                tensors = known.decode(file)
            for bits, group in {(unwrap(w).bits, unwrap(w).group) for w in tensors.values() if is_packed(w)}:
                beside = file.quantization, file.config.get("quantization"), file.config.get("quantization_config")
                for stated in beside:
                    check_json(file, stated, {"bits": bits, "group_size": group}, where="the JSON beside them")
            return known.name, tensors
    odd = ((name, str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch."))
           for name, value in file.tensors.items() if getattr(value, "dtype", None) not in FLOATS)
    found = next((f"tensors such as {name} ({kind})" for name, kind in odd), file.sample())
    raise ModelFileError(file.path, "a Bonsai Image model (GemLite, GGUF, MLX, unpacked or our own format)", found,
                         host_loader(file))


def refuse_other_than_tensors(file: TensorFile) -> None:
    """Raise ModelFileError if ``file``, a pickle, holds anything else."""
    for name, value in file.tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ModelFileError(file.path, f"{name} to be a tensor", f"a {type(value).__name__}")


def container_suffixes() -> set[str]:
    """Suffixes of files other than safetensors and pickles."""
    return {suffix for known in FORMATS for suffix in known.readers}


def targets() -> tuple[str, ...]:
    """What ``convert --to`` offers."""
    return tuple(name for known in FORMATS for name in known.writers)


def writer(target: str, path: Path) -> Writer:
    """The writer for one of :func:`targets`. Raises ModelFileError, about ``path``, for any other name."""
    for known in FORMATS:
        if target in known.writers:
            return known.writers[target]
    raise ModelFileError(path, f"one of the formats {', '.join(targets())}", target, "choose one of them")
