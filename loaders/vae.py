"""The architecture of the VAE: diffusers' AutoencoderKLFlux2, its dimensions read off the tensors.

The decoder may be narrower than the encoder. The latent is patched 2 x 2 before its batch norm, hence four times the
channels there.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .check import Shapes, check_json, check_tensors, count_numbered
from .errors import ModelFileError
from .files import TensorFile

_IMAGE_CHANNELS, _PATCH = 3, 4
#: Bounds the table of shapes: a hostile file could make it blocks x resnets long.
_MOST = 99
_COUNTER = "bn.num_batches_tracked"
#: Parts of the names in Black Forest Labs' own layout, which ComfyUI saves, and diffusers' for them.
_DIFFUSERS = {
    r"^(en|de)coder\.((post_)?quant_conv)\.": r"\2.",
    r"encoder\.down\.": "encoder.down_blocks.", r"\.block\.": ".resnets.", r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.(down|up)sample\.": r".\1samplers.0.", r"coder\.norm_out\.": "coder.conv_norm_out.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.", r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.", r"(\.attentions\.0\.)norm\.": r"\1group_norm.",
    r"(\.attentions\.0\.)([qkv])\.": r"\1to_\2.", r"(\.attentions\.0\.)proj_out\.": r"\1to_out.0.",
}


def is_vae(names: Mapping[str, object]) -> bool:
    """Whether these tensor names, diffusers' or Black Forest Labs', are those of an AutoencoderKLFlux2 (the latent's
    batch norm sets it apart)."""
    first = {"decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"}
    return {"decoder.conv_in.weight", "bn.running_mean"} <= names.keys() and bool(first & names.keys())


def to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under diffusers' names; Black Forest Labs count the decoder's blocks from its end, and have attention
    as 1 x 1 convolutions."""
    last = count_numbered(tensors, r"decoder\.up\.(\d{1,4})\.") - 1
    result = {}
    for name, tensor in tensors.items() if last >= 0 else ():
        name = re.sub(r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{last - int(match[1])}.", name)
        for theirs, ours in _DIFFUSERS.items():
            name = re.sub(theirs, ours, name)
        result[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return result or dict(tensors)


def _resnet(name: str, columns: int, rows: int) -> Shapes:
    shapes = {f"{name}.norm1": (columns,), f"{name}.conv1": (rows, columns, 3, 3),
              f"{name}.norm2": (rows,), f"{name}.conv2": (rows, rows, 3, 3)}
    return shapes if rows == columns else {**shapes, f"{name}.conv_shortcut": (rows, columns, 1, 1)}


def _coder(name: str, tensors: Mapping[str, torch.Tensor], widths: list[int], resnets: int,
           ends: tuple[int, int]) -> Shapes:
    """The weights of the ``encoder``'s or ``decoder``'s layers, each of which has a bias: blocks of ``widths`` in
    order, ``resnets`` in each, ``ends`` channels in and out."""
    blocks, sampler, middle = (("down_blocks", "downsamplers", widths[-1]) if name == "encoder" else
                               ("up_blocks", "upsamplers", widths[0]))
    shapes = {f"{name}.conv_in": (widths[0], ends[0], 3, 3), f"{name}.conv_out": (ends[1], widths[-1], 3, 3),
              f"{name}.conv_norm_out": (widths[-1],)}
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        for j in range(resnets):
            shapes |= _resnet(f"{name}.{blocks}.{i}.resnets.{j}", width if j else before, width)
        if i < len(widths) - 1:
            shapes[f"{name}.{blocks}.{i}.{sampler}.0.conv"] = (width, width, 3, 3)
    for j in range(2):
        shapes |= _resnet(f"{name}.mid_block.resnets.{j}", middle, middle)
    prefix = f"{name}.mid_block.attentions.0"
    if f"{prefix}.to_q.weight" in tensors:
        shapes[f"{prefix}.group_norm"] = (middle,)
        shapes |= {f"{prefix}.{part}": (middle, middle) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    return shapes


def _rows(tensors: Mapping[str, torch.Tensor], name: str) -> list[int]:
    """The rows of the tensors of this ``name`` with 0, 1 ... in its place for a number, as far as there are any."""
    rows: list[int] = []
    while (tensor := tensors.get(name.format(len(rows)))) is not None and tensor.ndim and len(rows) < _MOST:
        rows.append(tensor.shape[0])
    return rows


def check_vae(file: TensorFile) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Check that ``file`` holds one complete, finite AutoencoderKLFlux2, and return its tensors and its ``config.json``
    (empty without one), whose dimensions are brought in line with the tensors. Raises ModelFileError.

    The batch counter, which inference never reads, may be of any dtype, a scalar or one element, or missing; what is
    returned always has it as an int64 scalar.
    """
    tensors = to_diffusers(file.tensors)
    counter = tensors.pop(_COUNTER, torch.zeros(()))

    encoder = _rows(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    decoder = _rows(tensors, "decoder.up_blocks.{}.resnets.0.conv1.weight")
    resnets = len(_rows(tensors, "encoder.down_blocks.0.resnets.{}.conv1.weight"))
    first = tensors["decoder.conv_in.weight"]
    if not encoder or not decoder or first.ndim != 4 or counter.numel() != 1:
        raise ModelFileError(file.path, "the tensors of the FLUX.2 VAE", "no usable encoder, decoder or batch norm")
    latent = first.shape[1]
    layers = (_coder("encoder", tensors, encoder, resnets, (_IMAGE_CHANNELS, 2 * latent))
              | _coder("decoder", tensors, decoder, resnets + 1, (latent, _IMAGE_CHANNELS)))
    for name, width in (("quant_conv", 2 * latent), ("post_quant_conv", latent)):
        if f"{name}.weight" in tensors:
            layers[name] = (width, width, 1, 1)
    shapes: Shapes = {"bn.running_mean": (_PATCH * latent,), "bn.running_var": (_PATCH * latent,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    check_tensors(file, tensors, shapes)
    known = {"latent_channels": latent, "layers_per_block": resnets, "block_out_channels": encoder,
             "decoder_block_out_channels": decoder[::-1]}
    check_json(file, file.config, known)
    config = file.config | {key: value for key, value in known.items() if file.config.get(key) is not None}
    return {**tensors, _COUNTER: torch.zeros((), dtype=torch.int64)}, config
