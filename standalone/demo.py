"""The demo: six prompts through the trained miniature, with dense, ternary and binary weights side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..loaders import ModelFileError, Transformer, load_transformer
from ..loaders.klein import check_klein
from ..loaders.opening import open_tensors, tensor_files
from .generate import Compute, Result, complete_repository, generate

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


def load(variant: str) -> Transformer:
    """A variant of the miniature. The loaders refuse the dense one, as any ordinary FLUX.2 model."""
    path = MINIATURE / VARIANTS[variant]
    if variant != "dense":
        return load_transformer(path)
    file = open_tensors(path)
    return Transformer(file.path, "dense", file.tensors, check_klein(file, file.tensors))


def draw(compute: Compute, steps: int = 4, seed: int = 0, progress: bool = True) -> dict[str, Result]:
    """:data:`PROMPTS` through every variant. Raises ModelFileError without the miniature."""
    if not MINIATURE.is_dir():
        raise ModelFileError(MINIATURE, "the trained miniature", "no such folder",
                             "clone the repository; the registry's archive leaves it out")
    repository = complete_repository(MINIATURE / "ternary")
    return {variant: generate(repository, PROMPTS, compute, SIDE, SIDE, steps, seed, model=load(variant),
                              progress=progress) for variant in VARIANTS}


def file_bytes(variant: str) -> int:
    """The bytes of a variant's weights on disk."""
    return sum(file.stat().st_size for file in tensor_files(MINIATURE / VARIANTS[variant]))


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
