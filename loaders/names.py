"""Tensor names of FLUX.2 Klein: diffusers' and ComfyUI's, and the lossless way between them.

Two things are more than a renaming: ComfyUI fuses the q, k and v projections of a double-stream block into one (rows
concatenated, which works on packed rows), and stores the final modulation as (shift, scale) where diffusers has
(scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ..ops.packed import is_packed, parts, rewrap
from .errors import CHOOSE_UNMODIFIED, ModelFileError

Value = TypeVar("Value")

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_SWAPPED = "final_layer.adaLN_modulation.1.weight"
#: Prefixes under which single-file checkpoints nest the diffusion model.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def count_blocks(names: Mapping[str, object]) -> tuple[int, int]:
    """(double-stream, single-stream) blocks that the names, of either convention, speak of."""
    double = {int(m[1]) for name in names if (m := re.match(r"(?:double|transformer)_blocks\.(\d{1,4})\.", name))}
    single = {int(m[1]) for name in names if (m := re.match(r"single_(?:transformer_)?blocks\.(\d{1,4})\.", name))}
    return len(double), len(single)


def name_map(double: int, single: int) -> dict[str, tuple[str, ...]]:
    """ComfyUI tensor name -> the one or three diffusers names it is made of, for so many blocks."""
    pairs: list[tuple[str, str | tuple[str, ...]]] = list(_TOP.items())
    for i in range(double):
        for ours, theirs in _DOUBLE.items():
            names = (theirs,) if isinstance(theirs, str) else theirs
            pairs.append((f"double_blocks.{i}.{ours}", tuple(f"transformer_blocks.{i}.{name}" for name in names)))
    for i in range(single):
        pairs.extend((f"single_blocks.{i}.{ours}", f"single_transformer_blocks.{i}.{theirs}")
                     for ours, theirs in _SINGLE.items())
    return {
        f"{ours}.weight": tuple(f"{name}.weight" for name in ((theirs,) if isinstance(theirs, str) else theirs))
        for ours, theirs in pairs
    }


def is_packable(name: str) -> bool:
    """Whether Bonsai packs the tensor of this name (either convention): the linears inside the blocks."""
    return bool(re.match(r"(single_|double_)?(transformer_)?blocks\.", name)) and "norm" not in name


def is_comfyui(names: Mapping[str, object]) -> bool:
    return "img_in.weight" in names


def prefix(names: Mapping[str, object]) -> str:
    """The prefix under which a checkpoint nests the diffusion model; empty without one."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}img_in.weight" in names), "")


def normalise(path: Path, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Strip a checkpoint prefix, and bring the norm names of older ComfyUI files (``.scale``) to ``.weight``. What the
    names stand for does not matter.

    Raises ModelFileError where that makes two tensors one.
    """
    nested = prefix(tensors)
    result = {re.sub(r"_norm\.scale$", "_norm.weight", name.removeprefix(nested)): tensor
              for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise ModelFileError(path, "each tensor once", "duplicates after removing the prefix", CHOOSE_UNMODIFIED)
    return result


def cat_rows(weights: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate weights, all packed alike or all dense, along their rows."""
    packed = [parts(weight) for weight in weights if is_packed(weight)]
    if not packed:
        return torch.cat(weights)
    if len(packed) < len(weights) or len({(p.bits, p.form, p.group) for p in packed}) > 1:
        raise ValueError("q, k and v of one block are not packed alike")
    shifts = [p.shift for p in packed if p.shift is not None]
    joined = packed[0]._replace(codes=torch.cat([p.codes for p in packed]), scale=torch.cat([p.scale for p in packed]),
                                shift=torch.cat(shifts) if shifts else None)
    return rewrap(joined, weights[0].dtype)


def split_rows(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut a packed or dense weight into ``count`` equal runs of rows (views)."""
    if not is_packed(weight):
        return list(weight.chunk(count))
    rows = weight.shape[0] // count
    return [rewrap(parts(weight).rows(slice(i * rows, (i + 1) * rows)), weight.dtype) for i in range(count)]


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    first, second = weight.chunk(2)
    return torch.cat((second, first))


def to_comfyui(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A complete set of diffusers tensors under ComfyUI's names; one already so named is returned as it is."""
    if is_comfyui(tensors):
        return tensors
    result = {}
    for name, sources in name_map(*count_blocks(tensors)).items():
        result[name] = tensors[sources[0]] if len(sources) == 1 else cat_rows([tensors[source] for source in sources])
    result[_SWAPPED] = _swap_halves(result[_SWAPPED])
    return result


def to_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_comfyui`."""
    if not is_comfyui(tensors):
        return tensors
    result: dict[str, torch.Tensor] = {}
    for name, targets in name_map(*count_blocks(tensors)).items():
        tensor = _swap_halves(tensors[name]) if name == _SWAPPED else tensors[name]
        result.update(zip(targets, split_rows(tensor, len(targets)) if len(targets) > 1 else [tensor], strict=True))
    return result
