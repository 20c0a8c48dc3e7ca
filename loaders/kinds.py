"""What a file is, judged by the names of its tensors, and saying so where it is in the wrong place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from . import klein, names, qwen3, vae
from .errors import CHOOSE_MODEL, CHOOSE_TEXT_ENCODER, ModelFileError
from .files import TensorFile

_CHOOSE = {"transformer": CHOOSE_MODEL, "text_encoder": CHOOSE_TEXT_ENCODER, "vae": "choose the VAE of Bonsai Image"}
#: What the parts of a repository are called in sentences.
WORDS = {"transformer": "diffusion model", "text_encoder": "text encoder", "vae": "VAE"}

#: Files of other kinds that users confuse with ours: what they are called, and how their names show it.
_OTHERS: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("a LoRA", re.compile(r"\.lora_|\.lokr_|\.hada_|(^|\.)lora_unet_").search),
    ("a FLUX.1 model", re.compile(r"(^|\.)(double_blocks\.0\.img_mod|transformer_blocks\.0\.norm1_context)\.").search),
    ("a VAE in another layout than diffusers'", re.compile(r"^decoder\.(up\.0|mid\.block_1)\.").search),
    ("the VAE of another model", re.compile(r"^decoder\.conv_in\.weight$").search),
)


def part_of(tensors: Mapping[str, object]) -> str | None:
    """Which part of a repository these tensors are: ``transformer``, ``text_encoder``, ``vae``, or None."""
    if qwen3.is_qwen3(tensors):
        return "text_encoder"
    if vae.is_vae(tensors):
        return "vae"
    nested = names.prefix(tensors)
    return "transformer" if klein.is_klein({name.removeprefix(nested): None for name in tensors}) else None


def require(file: TensorFile, part: str) -> None:
    """Raise ModelFileError, saying what ``file`` is instead, unless its tensors are those of ``part``."""
    if (found := part_of(file.tensors)) == part:
        return
    other = next((label for label, matches in _OTHERS if any(map(matches, file.tensors))), None)
    if found is not None:
        text = f"the {WORDS[found]} of Bonsai Image"
    else:
        text = other or f"tensors such as {next(iter(file.tensors), 'none')}"
    raise ModelFileError(file.path, f"the {WORDS[part]} of Bonsai Image", text, _CHOOSE[part])
