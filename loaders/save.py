"""Saving a diffusion model in any format, losslessly, verified before it counts as done.

What is written goes to a temporary name beside the target, is flushed to disk, loaded back and compared tensor by
tensor; only then it takes its name. An existing file is never touched.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..ops.packed import equal, is_packed
from . import bonsai, dense, gemlite, mlx
from .detect import Transformer, load_transformer
from .errors import ModelFileError
from .files import SAFETENSORS_SUFFIXES, Progress, no_progress, open_tensors
from .names import to_comfyui, to_diffusers

TARGETS = ("comfy", "mlx", "gemlite", "diffusers")
_WEIGHTS = "diffusion_pytorch_model"
_SHARD_SIZE = "1GB"


def _write(model: Transformer, target: str, base3: bool, path: Path) -> None:
    """Write ``model`` to ``path``: a file for ``comfy``, a folder for the others. Raises ValueError if it does not fit
    the format."""
    if target == "comfy":
        save_file(bonsai.encode(to_comfyui(model.tensors), base3), path, bonsai.metadata(model.variant, model.source))
        return
    path.mkdir()
    tensors = to_diffusers(model.tensors)
    packed = [tensor._params for tensor in tensors.values() if is_packed(tensor)]
    _write_json(path / "config.json", {"_class_name": "Flux2Transformer2DModel", **model.config.diffusers()})
    if target == "diffusers":
        # One shard is expanded at a time: the whole dense model never exists in memory.
        _write_shards(tensors, path)
        return
    _write_json(path / "quantization_config.json", {"bits": packed[0].bits, "group_size": packed[0].group})
    if target == "mlx":
        save_file(mlx.encode(tensors), path / f"{_WEIGHTS}.safetensors", {"format": "mlx"})
    else:
        torch.save(gemlite.encode(tensors), path / "state_dict.pt")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    outlines = {name: torch.empty(tensor.shape, dtype=tensor._params.scale.dtype if is_packed(tensor) else tensor.dtype,
                                  device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(outlines, filename_pattern=f"{_WEIGHTS}{{suffix}}.safetensors",
                                               max_shard_size=_SHARD_SIZE)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: dense.expand(tensors[name]) for name in names}, folder / filename, {"format": "pt"})
    if split.is_sharded:
        _write_json(folder / f"{_WEIGHTS}.safetensors.index.json",
                    {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _verify(model: Transformer, target: str, path: Path, progress: Progress) -> None:
    """Raise ModelFileError unless ``path`` loads to exactly the tensors of ``model``."""
    if target == "diffusers":
        # Dense weights do not say which codes they came from where a whole group is zero, or a scale negative.
        expected, written, same = to_diffusers(model.tensors), open_tensors(path).tensors, _same_dense
    else:
        expected, written, same = to_comfyui(model.tensors), to_comfyui(load_transformer(path, progress).tensors), _same
    for name, tensor in expected.items():
        if not same(tensor, written[name]):
            raise ModelFileError(path, f"{name} as in {model.path}", "a difference after writing", "check the disk")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return equal(one, other) if is_packed(one) else torch.equal(one, other)


def _same_dense(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(dense.expand(one), other)


def _flush(path: Path) -> None:
    """Bring what was written to disk, readable by whom the umask says (safetensors writes for the owner only)."""
    probe = path.with_name("probe")  # beside a "model" or "model.safetensors", see below
    probe.touch()
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        file.chmod(probe.stat().st_mode)
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def save_transformer(model: Transformer, path: Path, target: str, base3: bool = False,
                     progress: Progress = no_progress) -> None:
    """Write ``model`` to ``path`` in the format ``target``, one of :data:`TARGETS`.

    ``progress`` follows the last part of it, the loading back (a dense one is mapped at once). Raises ModelFileError
    on an existing path, a name of the wrong kind, or a format that cannot hold the weights exactly.
    """
    if base3 and target != "comfy":
        raise ModelFileError(path, "base 3 with the comfy format", f"the {target} format", "drop base 3")
    if base3 and model.variant != "ternary":
        raise ModelFileError(model.path, "ternary weights, which base 3 stores", f"{model.variant} ones", "drop base 3")
    if target == "comfy" and path.suffix not in SAFETENSORS_SUFFIXES:
        raise ModelFileError(path, f"a file name ending in {SAFETENSORS_SUFFIXES[0]}", f"{path.name!r}",
                             "add the ending")
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bonsai-image-") as scratch:
        written = Path(scratch) / f"model{path.suffix if target == 'comfy' else ''}"
        try:
            _write(model, target, base3, written)
            _flush(written)
        except ValueError as error:
            raise ModelFileError(model.path, f"weights that the {target} format holds exactly", str(error),
                                 "choose another format") from error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelFileError(path, "a disk that takes the file", str(error),
                                 "free some space or choose another folder") from error
        _verify(model, target, written, progress)
        # Somebody else may have been quicker.
        _refuse_existing(path)
        written.rename(path)


def _refuse_existing(path: Path) -> None:
    # A link to a disk that is not there exists, too.
    if os.path.lexists(path):
        raise ModelFileError(path, "a path that is free", "an existing file or folder", "choose another name")
