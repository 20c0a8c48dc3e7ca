"""The architecture of the diffusion model: FLUX.2 Klein, its dimensions read off the tensors, and the check that a
state dict is exactly one such model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.packed import is_packed
from .check import Shapes, check_json, check_tensors, read_shapes
from .errors import CHOOSE_MODEL, ModelFileError
from .files import TensorFile
from .names import MLP_RATIO, alike, count_blocks, is_comfyui, is_packable, layers, prefix

HEAD_DIM = 128
#: What no tensor shows, and what every shape rests on.
_FIXED = {"patch_size": 1, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6}
_SHOWN = {"attention_head_dim": HEAD_DIM, "timestep_guidance_channels": 256, "mlp_ratio": float(MLP_RATIO)}


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
        return {**_FIXED, **_SHOWN, **asdict(self), "guidance_embeds": False}


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
    return any(f"{prefix(names)}double_stream_modulation_img.{linear}.weight" in names for linear in ("lin", "linear"))


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
    check_json(file, file.config, known, _FIXED)
    for name, tensor in tensors.items():
        if is_packed(tensor) and not is_packable(name):
            raise ModelFileError(file.path, f"{name} to be dense", "it packed, though Bonsai packs only the linears "
                                 "inside the blocks", CHOOSE_MODEL)
    for sources, _ in layers(config.num_layers, config.num_single_layers).values():
        if not is_comfyui(tensors) and not alike([tensors[source] for source in sources]):
            raise ModelFileError(file.path, f"{sources[0]} packed like the other projections of its block",
                                 "another packing")
    return config
