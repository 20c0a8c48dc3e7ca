"""The lossless way between diffusers' and ComfyUI's names for the layers of FLUX.2 Klein (``klein.py``).

Two things are more than a renaming: ComfyUI fuses the q, k and v projections of a double-stream block into one (rows
concatenated, which works on packed rows), and stores the final modulation as (shift, scale) where diffusers has
(scale, shift).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ..ops.packed import is_packed
from .errors import CHOOSE_UNMODIFIED, ModelFileError
from .klein import alike, count_blocks, is_comfyui, layers

Value = TypeVar("Value")

#: The layer whose halves the two have in opposite order.
FINAL_MODULATION = "final_layer.adaLN_modulation.1"
_SWAPPED = f"{FINAL_MODULATION}.weight"
#: The prefixes under which the files of ComfyUI's Save Checkpoint, Save Model and CLIPSave nest the parts of a model.
PREFIXES = {"transformer": ("model.diffusion_model.", "diffusion_model."), "vae": ("vae.",),
            "text_encoder": tuple(f"{place}qwen3_{size}.transformer." for size in ("4b", "8b")
                                  for place in ("text_encoders.", ""))}


def nested(tensors: Mapping[str, Value], part: str) -> tuple[str, dict[str, Value]]:
    """The prefix under which a checkpoint nests its ``part``, and the tensors that have it, without it; without a
    prefix all of them."""
    prefix = next((prefix for prefix in PREFIXES[part] if any(name.startswith(prefix) for name in tensors)), "")
    return prefix, {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def normalise(path: Path, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Bring the norm names of older ComfyUI files (``.scale``) to ``.weight``, whatever the names stand for.

    Raises ModelFileError where that makes two tensors one.
    """
    result = {re.sub(r"_norm\.scale$", "_norm.weight", name): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise ModelFileError(path, "each tensor once", "a norm under two names", CHOOSE_UNMODIFIED)
    return result


def _join(weights: list[torch.Tensor]) -> torch.Tensor:
    if not alike(weights):
        raise ValueError("q, k and v of one block are not packed alike")
    # Their scales may differ in dtype, but torch.cat keeps only those packed that present the same.
    return torch.cat([w.to(dtype=weights[0].dtype) if is_packed(w) else w for w in weights])


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    return weight.roll(len(weight) // 2, 0)


def to_comfyui(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A complete set of diffusers tensors under ComfyUI's names; one already so named is returned as it is."""
    if is_comfyui(tensors):
        return tensors
    result = {}
    for name, (sources, _) in layers(*count_blocks(tensors)).items():
        weights = [tensors[source] for source in sources]
        result[name] = _join(weights) if len(weights) > 1 else weights[0]
    result[_SWAPPED] = _swap_halves(result[_SWAPPED])
    return result


def to_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_comfyui`. The parts of a joined weight are views of it."""
    if not is_comfyui(tensors):
        return tensors
    result: dict[str, torch.Tensor] = {}
    for name, (targets, _) in layers(*count_blocks(tensors)).items():
        tensor = _swap_halves(tensors[name]) if name == _SWAPPED else tensors[name]
        result.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    return result
