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
from .names import MLP_RATIO, alike, count_blocks, is_comfyui, is_packable, layers, prefix

HEAD_DIM, TIMESTEP_CHANNELS = 128, 256
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


def comfyui_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by ComfyUI name."""
    sizes = {**vars(config), "head_dim": HEAD_DIM, "timestep_channels": TIMESTEP_CHANNELS}
    return {name: tuple(sizes[size] if isinstance(size, str) else size * config.hidden for size in shape)
            for name, (_, shape) in layers(config.double_blocks, config.single_blocks).items()}


def diffusers_shapes(config: KleinConfig) -> Shapes:
    """The shape of every tensor, by diffusers name."""
    joined = comfyui_shapes(config)
    return {source: (joined[name][0] // len(sources), *joined[name][1:])
            for name, (sources, _) in layers(config.double_blocks, config.single_blocks).items() for source in sources}


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
    for sources, _ in layers(config.double_blocks, config.single_blocks).values():
        if not is_comfyui(tensors) and not alike([tensors[source] for source in sources]):
            raise ModelFileError(file.path, f"{sources[0]} packed like the other projections of its block",
                                 "another packing")
    return config
