"""The architecture of the VAE: diffusers' AutoencoderKLFlux2, its dimensions read off the tensors.

The decoder may be narrower than the encoder. The latent is patched 2 x 2 before its batch norm, hence four times the
channels there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from .check import check_config, check_tensors
from .errors import DOWNLOAD_AGAIN, ModelFileError
from .files import TensorFile

_IMAGE_CHANNELS, _PATCH = 3, 4
_COUNTER = "bn.num_batches_tracked"


def is_vae(names: Mapping[str, object]) -> bool:
    """Whether these tensor names are those of an AutoencoderKLFlux2 (the latent's batch norm sets it apart)."""
    return {"decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "bn.running_mean"} <= names.keys()


def _conv(name: str, rows: int, columns: int, size: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns, size, size), f"{name}.bias": (rows,)}


def _vector(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    shapes = {**_vector(f"{name}.norm1", columns), **_conv(f"{name}.conv1", rows, columns),
              **_vector(f"{name}.norm2", rows), **_conv(f"{name}.conv2", rows, rows)}
    return shapes if rows == columns else {**shapes, **_conv(f"{name}.conv_shortcut", rows, columns, 1)}


def _coder(name: str, blocks: str, sampler: str, widths: list[int], resnets: int, attention: bool,
           ends: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Encoder or decoder: blocks of ``widths`` in order, ``resnets`` in each, ``ends`` channels in and out."""
    middle = widths[-1] if blocks == "down_blocks" else widths[0]
    shapes = {**_conv(f"{name}.conv_in", widths[0], ends[0]), **_conv(f"{name}.conv_out", ends[1], widths[-1]),
              **_vector(f"{name}.conv_norm_out", widths[-1])}
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        for j in range(resnets):
            shapes |= _resnet(f"{name}.{blocks}.{i}.resnets.{j}", width if j else before, width)
        if i < len(widths) - 1:
            shapes |= _conv(f"{name}.{blocks}.{i}.{sampler}.0.conv", width, width)
    for j in range(2):
        shapes |= _resnet(f"{name}.mid_block.resnets.{j}", middle, middle)
    if attention:
        prefix = f"{name}.mid_block.attentions.0"
        shapes |= _vector(f"{prefix}.group_norm", middle)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= {f"{prefix}.{part}.weight": (middle, middle), f"{prefix}.{part}.bias": (middle,)}
    return shapes


def check_vae(file: TensorFile) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Check that ``file`` holds one complete, finite AutoencoderKLFlux2, and return its tensors and its ``config.json``
    (empty without one), whose dimensions are brought in line with the tensors. Raises ModelFileError.

    The batch counter, which inference never reads, may be of any dtype, a scalar or one element, or missing; what is
    returned always has it as an int64 scalar.
    """
    tensors = dict(file.tensors)
    counter = tensors.pop(_COUNTER, torch.zeros(()))

    def widths(blocks: str) -> list[int]:
        found = {int(m[1]): tensor.shape[0] for name, tensor in tensors.items() if tensor.ndim and (
            m := re.fullmatch(rf"{blocks}\.(\d{{1,2}})\.resnets\.0\.conv1\.weight", name))}
        return [found[i] for i in sorted(found)]

    encoder, decoder = widths(r"encoder\.down_blocks"), widths(r"decoder\.up_blocks")
    pattern = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d{1,2}\.conv1\.weight")
    resnets = sum(1 for name in tensors if pattern.fullmatch(name))
    first = tensors["decoder.conv_in.weight"]
    if not encoder or not decoder or first.ndim != 4 or counter.numel() != 1:
        raise ModelFileError(file.path, "the tensors of the FLUX.2 VAE", "no usable encoder, decoder or batch norm",
                             DOWNLOAD_AGAIN)
    latent = first.shape[1]
    shapes = {
        **_coder("encoder", "down_blocks", "downsamplers", encoder, resnets,
                 "encoder.mid_block.attentions.0.to_q.weight" in tensors, (_IMAGE_CHANNELS, 2 * latent)),
        **_coder("decoder", "up_blocks", "upsamplers", decoder, resnets + 1,
                 "decoder.mid_block.attentions.0.to_q.weight" in tensors, (latent, _IMAGE_CHANNELS)),
        "bn.running_mean": (_PATCH * latent,), "bn.running_var": (_PATCH * latent,),
    }
    for name, width in (("quant_conv", 2 * latent), ("post_quant_conv", latent)):
        if f"{name}.weight" in tensors:
            shapes |= _conv(name, width, width, 1)
    check_tensors(file, tensors, shapes)
    known = {"latent_channels": latent, "layers_per_block": resnets, "block_out_channels": encoder,
             "decoder_block_out_channels": decoder[::-1]}
    check_config(file, known)
    config = file.config | {key: value for key, value in known.items() if file.config.get(key) is not None}
    return {**tensors, _COUNTER: torch.zeros((), dtype=torch.int64)}, config
