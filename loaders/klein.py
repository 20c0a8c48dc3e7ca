"""The architecture of the diffusion model: FLUX.2 Klein, its dimensions read off the tensors, and the check that a
state dict is exactly one such model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import is_packed
from .check import Shapes, check_json, check_tensors, read_shapes
from .errors import CHOOSE_MODEL, ModelFileError
from .files import TensorFile
from .names import alike, count_blocks, is_comfyui, is_packable, name_map, prefix

HEAD_DIM, MLP_RATIO, TIMESTEP_CHANNELS = 128, 3, 256
#: What no tensor shows.
_FIXED = {"patch_size": 1, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6}


@dataclass(frozen=True)
class KleinConfig:
    """Dimensions of a FLUX.2 Klein transformer. The 4B release: 3072 wide, 5 + 20 blocks, text 7680, 128 channels."""

    hidden: int
    text_width: int
    in_channels: int
    out_channels: int
    double_blocks: int
    single_blocks: int

    def diffusers(self) -> dict[str, Any]:
        """The arguments of ``diffusers.Flux2Transformer2DModel``."""
        return {
            **_FIXED,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": self.hidden // HEAD_DIM,
            "joint_attention_dim": self.text_width,
            "timestep_guidance_channels": TIMESTEP_CHANNELS,
            "mlp_ratio": float(MLP_RATIO),
            "guidance_embeds": False,
        }


def diffusers_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by diffusers name."""
    h, mlp = config.hidden, MLP_RATIO * config.hidden
    shapes: Shapes = {
        "x_embedder": (h, config.in_channels),
        "context_embedder": (h, config.text_width),
        "time_guidance_embed.timestep_embedder.linear_1": (h, TIMESTEP_CHANNELS),
        "time_guidance_embed.timestep_embedder.linear_2": (h, h),
        "double_stream_modulation_img.linear": (6 * h, h),
        "double_stream_modulation_txt.linear": (6 * h, h),
        "single_stream_modulation.linear": (3 * h, h),
        "norm_out.linear": (2 * h, h),
        "proj_out": (config.out_channels, h),
    }
    for i in range(config.double_blocks):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"{block}.attn.{name}"] = (h, h)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}"] = (HEAD_DIM,)
        for name in ("ff", "ff_context"):
            shapes |= {f"{block}.{name}.linear_in": (2 * mlp, h), f"{block}.{name}.linear_out": (h, mlp)}
    for i in range(config.single_blocks):
        block = f"single_transformer_blocks.{i}.attn"
        shapes |= {f"{block}.to_qkv_mlp_proj": (3 * h + 2 * mlp, h), f"{block}.to_out": (h, h + mlp),
                   f"{block}.norm_q": (HEAD_DIM,), f"{block}.norm_k": (HEAD_DIM,)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def comfyui_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by ComfyUI name."""
    shapes = diffusers_shapes(config)
    return {
        name: (len(sources) * shapes[sources[0]][0], *shapes[sources[0]][1:])
        for name, sources in name_map(config.double_blocks, config.single_blocks).items()
    }


def is_klein(names: Mapping[str, object]) -> bool:
    """Whether these tensor names, of either convention, are those of a FLUX.2 transformer."""
    return any(f"{prefix(names)}double_stream_modulation_img.{linear}.weight" in names for linear in ("lin", "linear"))


def read_config(path: Path, tensors: Mapping[str, torch.Tensor]) -> KleinConfig:
    """The dimensions of the FLUX.2 Klein model in ``tensors``, of either naming convention.

    Read off the layers outside the blocks: those inside may be in any format. Raises ModelFileError.
    """
    outer = ("img_in", "txt_in", "final_layer.linear") if is_comfyui(tensors) else (
        "x_embedder", "context_embedder", "proj_out")
    (hidden, in_channels), (_, text_width), (out_channels, _) = read_shapes(
        path, tensors, {f"{name}.weight": 2 for name in outer}, "FLUX.2 Klein", CHOOSE_MODEL)
    double, single = count_blocks(tensors)
    if hidden % HEAD_DIM or not double or not single:
        raise ModelFileError(path, f"a width that is a multiple of {HEAD_DIM} and blocks of both kinds",
                             f"width {hidden}, {double} double and {single} single blocks", CHOOSE_MODEL)
    if in_channels != out_channels:
        raise ModelFileError(path, "as many latent channels out as in", f"{in_channels} in and {out_channels} out",
                             CHOOSE_MODEL)
    return KleinConfig(hidden, text_width, in_channels, out_channels, double, single)


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
    check_json(file, file.config, known, _FIXED)
    for name, tensor in tensors.items():
        if is_packed(tensor) and not is_packable(name):
            raise ModelFileError(file.path, f"{name} to be dense", "it packed, though Bonsai packs only the linears "
                                 "inside the blocks", CHOOSE_MODEL)
    for sources in name_map(config.double_blocks, config.single_blocks).values():
        if not is_comfyui(tensors) and not alike([tensors[source] for source in sources]):
            raise ModelFileError(file.path, f"{sources[0]} packed like the other projections of its block",
                                 "another packing")
    return config
