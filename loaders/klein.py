"""The diffusion model, FLUX.2 Klein: its layers as diffusers and ComfyUI name them, their shapes, its dimensions as the
tensors show them, and the check that a state dict is exactly one such model."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import is_packed, unwrap
from .check import Shapes, check_json, check_tensors, count_numbered, read_shapes
from .errors import CHOOSE_MODEL, ModelFileError
from .files import TensorFile

HEAD_DIM = 128
#: Width of an MLP in widths of the model. Its first layer computes a gate as well.
MLP_RATIO = 3
#: Visible in no tensor, but assumed by every shape.
FIXED = {"patch_size": 1, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6}
_SHOWN = {"attention_head_dim": HEAD_DIM, "timestep_guidance_channels": 256, "mlp_ratio": float(MLP_RATIO)}

#: In widths of the model, or by name where a dimension is no multiple of it (see :func:`comfyui_shapes`).
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


@dataclass(frozen=True)
class KleinConfig:
    """Dimensions of a FLUX.2 Klein transformer, as diffusers' ``config.json`` calls them; by default the 4B release's.

    ``joint_attention_dim`` is the width of the text, ``num_layers`` counts double-stream blocks.
    """

    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 5
    num_single_layers: int = 20

    def diffusers(self) -> dict[str, Any]:
        """The arguments of ``diffusers.Flux2Transformer2DModel``."""
        return {**FIXED, **_SHOWN, **asdict(self), "guidance_embeds": False}

    @property
    def published(self) -> tuple[str, str]:
        """Size and licence of the FLUX.2 Klein of this width; that of 9B has no common name."""
        return ("9B", "other") if self.num_attention_heads == 32 else ("4B", "apache-2.0")


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


def alike(weights: list[torch.Tensor]) -> bool:
    """Whether weights that ComfyUI joins into one are packed alike, or all dense."""
    packings = {(unwrap(w).bits, unwrap(w).form, unwrap(w).group) if is_packed(w) else None for w in weights}
    return len(packings) == 1


def comfyui_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by ComfyUI name."""
    sizes, width = config.diffusers(), config.num_attention_heads * HEAD_DIM
    return {name: tuple(sizes[size] if isinstance(size, str) else size * width for size in shape)
            for name, (_, shape) in layers(config.num_layers, config.num_single_layers).items()}


def diffusers_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by diffusers name."""
    joined = comfyui_shapes(config)
    return {source: (joined[name][0] // len(sources), *joined[name][1:])
            for name, (sources, _) in layers(config.num_layers, config.num_single_layers).items() for source in sources}


def is_klein(names: Mapping[str, object]) -> bool:
    """Whether these tensor names, of either convention, are those of a FLUX.2 transformer."""
    return any(f"double_stream_modulation_img.{linear}.weight" in names for linear in ("lin", "linear"))


def read_config(path: Path, tensors: Mapping[str, torch.Tensor]) -> KleinConfig:
    """The dimensions of the FLUX.2 Klein model in ``tensors``, of either naming convention.

    Read off the layers outside the blocks: those inside may be in any format. Raises ModelFileError.
    """
    outer = ("img_in", "txt_in", "final_layer.linear") if is_comfyui(tensors) else (
        "x_embedder", "context_embedder", "proj_out")
    (width, in_channels), (_, text_width), (out_channels, _) = read_shapes(
        path, tensors, {f"{name}.weight": 2 for name in outer}, "FLUX.2 Klein", CHOOSE_MODEL)
    double, single = count_blocks(tensors)
    if width % HEAD_DIM or not double or not single:
        raise ModelFileError(path, f"a width that is a multiple of {HEAD_DIM} and blocks of both kinds",
                             f"width {width}, {double} double and {single} single blocks", CHOOSE_MODEL)
    if in_channels != out_channels:
        raise ModelFileError(path, "as many latent channels out as in", f"{in_channels} in and {out_channels} out",
                             CHOOSE_MODEL)
    return KleinConfig(width // HEAD_DIM, text_width, in_channels, out_channels, double, single)


def shapes(config: KleinConfig, tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """The shape of every weight, under the names that ``tensors`` use."""
    return comfyui_shapes(config) if is_comfyui(tensors) else diffusers_shapes(config)


def check_klein(file: TensorFile, tensors: Mapping[str, torch.Tensor]) -> KleinConfig:
    """Check that ``tensors``, decoded from ``file``, are one complete, finite FLUX.2 Klein model; its dimensions.

    Raises ModelFileError on a missing, surplus, misshapen or non-finite tensor, on packed weights outside the blocks,
    and where ``config.json`` describes another model.
    """
    config = read_config(file.path, tensors)
    check_tensors(file, tensors, shapes(config, tensors))
    known = {key: value for key, value in config.diffusers().items() if key != "guidance_embeds"}
    check_json(file, file.config, known, FIXED)
    for name, tensor in tensors.items():
        if is_packed(tensor) and not is_packable(name):
            raise ModelFileError(file.path, f"{name} to be dense", "it packed, though Bonsai packs only the linears "
                                 "inside the blocks", CHOOSE_MODEL)
    for sources, _ in layers(config.num_layers, config.num_single_layers).values():
        if not is_comfyui(tensors) and not alike([tensors[source] for source in sources]):
            raise ModelFileError(file.path, f"{sources[0]} packed like the other projections of its block",
                                 "another packing")
    return config
