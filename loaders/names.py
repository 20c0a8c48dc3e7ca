"""The layers of FLUX.2 Klein: diffusers' and ComfyUI's names, shapes, and the lossless way between the two.

Two things are more than a renaming: ComfyUI fuses the q, k and v projections of a double-stream block into one (rows
concatenated, which works on packed rows), and stores the final modulation as (shift, scale) where diffusers has
(scale, shift).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ..ops.packed import is_packed, parts
from .errors import CHOOSE_UNMODIFIED, ModelFileError

Value = TypeVar("Value")

#: Width of an MLP in widths of the model. Its first layer computes a gate as well.
MLP_RATIO = 3
#: In widths of the model, or by name where a dimension is no multiple of it (see ``klein.comfyui_shapes``).
Shape = tuple[int | str, ...]
_NORM: Shape = ("attention_head_dim",)

#: ComfyUI's layers -> diffusers' (three where ComfyUI joins q, k and v), and the shape of the weight in ComfyUI.
_TOP: dict[str, tuple[str, Shape]] = {
    "img_in": ("x_embedder", (1, "in_channels")),
    "txt_in": ("context_embedder", (1, "joint_attention_dim")),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1", (1, "timestep_guidance_channels")),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2", (1, 1)),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear", (6, 1)),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear", (6, 1)),
    "single_stream_modulation.lin": ("single_stream_modulation.linear", (3, 1)),
    "final_layer.adaLN_modulation.1": ("norm_out.linear", (2, 1)),
    "final_layer.linear": ("proj_out", ("out_channels", 1)),
}
#: The same of a stream in a double-stream block; diffusers' in the image stream, and in the text stream.
_STREAM: dict[str, tuple[str, str, Shape]] = {
    "attn.qkv": ("attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", (3, 1)),
    "attn.proj": ("attn.to_out.0", "attn.to_add_out", (1, 1)),
    "attn.norm.query_norm": ("attn.norm_q", "attn.norm_added_q", _NORM),
    "attn.norm.key_norm": ("attn.norm_k", "attn.norm_added_k", _NORM),
    "mlp.0": ("ff.linear_in", "ff_context.linear_in", (2 * MLP_RATIO, 1)),
    "mlp.2": ("ff.linear_out", "ff_context.linear_out", (1, MLP_RATIO)),
}
_DOUBLE = {f"{stream}_{name}": (sources, shape) for name, (image, text, shape) in _STREAM.items()
           for stream, sources in (("img", image), ("txt", text))}
_SINGLE: dict[str, tuple[str, Shape]] = {
    "linear1": ("attn.to_qkv_mlp_proj", (3 + 2 * MLP_RATIO, 1)),
    "linear2": ("attn.to_out", (1, 1 + MLP_RATIO)),
    "norm.query_norm": ("attn.norm_q", _NORM),
    "norm.key_norm": ("attn.norm_k", _NORM),
}
_SWAPPED = "final_layer.adaLN_modulation.1.weight"
#: Prefixes under which single-file checkpoints nest the diffusion model.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of ``pattern`` takes at the start of ``names``."""
    return len({int(match[1]) for name in names if (match := re.match(pattern, name))})


def count_blocks(names: Mapping[str, object]) -> tuple[int, int]:
    """(double-stream, single-stream) blocks that the names, of either convention, speak of."""
    return (count_numbered(names, r"(?:double|transformer)_blocks\.(\d{1,4})\."),
            count_numbered(names, r"single_(?:transformer_)?blocks\.(\d{1,4})\."))


def layers(double: int, single: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
    """ComfyUI tensor name -> the one or three diffusers names it is made of, and its shape, for so many blocks."""
    tables = [("", "", _TOP)]
    tables += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", _DOUBLE) for i in range(double)]
    tables += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", _SINGLE) for i in range(single)]
    return {f"{ours}{name}.weight": (tuple(f"{theirs}{source}.weight" for source in sources.split()), shape)
            for ours, theirs, table in tables for name, (sources, shape) in table.items()}


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


def alike(weights: list[torch.Tensor]) -> bool:
    """Whether weights that ComfyUI joins into one are packed alike, or all dense."""
    packings = {(parts(w).bits, parts(w).form, parts(w).group) if is_packed(w) else None for w in weights}
    return len(packings) == 1


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
