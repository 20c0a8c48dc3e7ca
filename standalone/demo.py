"""The demo: six prompts through the trained miniature, with dense, ternary and binary weights side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..loaders import ModelFileError
from ..ops.backends import AUTO, Setting
from .generate import Result, generate

#: The miniature in a clone of the repository (``miniature/train`` trains it).
MINIATURE = Path(__file__).parent.parent / "miniature"
SIDE = 128
PROMPTS = (
    "a bonsai tree with green leaves in a yellow pot on a cream background",
    "a bonsai tree with pink leaves in a blue pot on a grey background",
    "a large red star at the bottom on a black background",
    "three red circles on a white background",
    "a small purple triangle at the top on a cream background",
    "a large yellow ring at the top left on a grey background",
)
#: Row of the sheet -> its file or folder.
VARIANTS = {"dense": "dense", "ternary": "ternary/transformer-packed-mflux", "binary": "binary.safetensors"}
_MARGIN, _LABEL, _LINES = 8, 118, 66


def draw(device: torch.device, dtype: torch.dtype, setting: Setting = AUTO, steps: int = 4, seed: int = 0,
         progress: bool = True) -> dict[str, Result]:
    """:data:`PROMPTS` through every variant. Raises ModelFileError without the miniature."""
    if not MINIATURE.is_dir():
        raise ModelFileError(MINIATURE, "the trained miniature", "no such folder",
                             "clone the repository; the registry's archive leaves it out")
    results = {}
    for variant, name in VARIANTS.items():
        model = {"dense" if variant == "dense" else "transformer": MINIATURE / name}
        results[variant] = generate(MINIATURE / "ternary", PROMPTS, device, dtype, setting, SIDE, SIDE, steps, seed,
                                    progress, **model)
    return results


def file_bytes(variant: str) -> int:
    """The bytes of a variant's weights on disk."""
    path = MINIATURE / VARIANTS[variant]
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def sheet(results: dict[str, Result]) -> Image.Image:
    """The images in one row per variant, above their prompts."""
    step = SIDE + _MARGIN
    image = Image.new("RGB", (_LABEL + len(PROMPTS) * step, len(results) * step + _MARGIN + _LINES), "white")
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    for row, (variant, result) in enumerate(results.items()):
        top = _MARGIN + row * step
        pen.text((_MARGIN, top + 44), variant, "black", font)
        pen.text((_MARGIN, top + 64), f"{file_bytes(variant) / 1e6:.2f} MB", "#555555", small)
        for column, drawn in enumerate(result.images):
            image.paste(drawn, (_LABEL + column * step, top))
    for column, prompt in enumerate(PROMPTS):
        pen.multiline_text((_LABEL + column * step, _MARGIN + len(results) * step), textwrap.fill(prompt, 21), "black",
                           small, spacing=3)
    return image
