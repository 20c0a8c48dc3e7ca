"""The demo: six prompts through the trained miniature, with dense, ternary and binary weights side by side, the packed
ones without and with the LoRA that brings them nearer to the dense ones.

    python miniature/demo.py [--out bonsai-demo.png] [options of ``bonsai-image generate`` on sampling and backends]
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bonsai_image.loaders import Transformer, load_lora, load_transformer
from bonsai_image.loaders.opening import tensor_files
from bonsai_image.standalone import cli, options
from bonsai_image.standalone.generate import Result, complete_repository, compute_of, generate, save_png

MINIATURE = Path(__file__).parent
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
#: Variant -> the LoRA that ``bonsai-image recover`` trained for it (``miniature/train/recovery.py``).
RECOVERY = {"ternary": "ternary_recovery.safetensors", "binary": "binary_recovery.safetensors"}
_MARGIN, _LABEL, _LINES = 8, 118, 66


def load(variant: str) -> Transformer:
    """A variant of the miniature."""
    return load_transformer(MINIATURE / VARIANTS[variant], dense=variant == "dense")


def sheet(results: dict[str, Result], file_bytes: dict[str, int]) -> Image.Image:
    """The images in one row per variant, above their prompts."""
    step = SIDE + _MARGIN
    image = Image.new("RGB", (_LABEL + len(PROMPTS) * step, len(results) * step + _MARGIN + _LINES), "white")
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    for row, (variant, result) in enumerate(results.items()):
        top = _MARGIN + row * step
        pen.text((_MARGIN, top + 44), variant, "black", font)
        pen.text((_MARGIN, top + 64), f"{file_bytes[variant] / 1e6:.2f} MB", "#555555", small)
        for column, drawn in enumerate(result.images):
            image.paste(drawn, (_LABEL + column * step, top))
    for column, prompt in enumerate(PROMPTS):
        pen.multiline_text((_LABEL + column * step, _MARGIN + len(results) * step), textwrap.fill(prompt, 21), "black",
                           small, spacing=3)
    return image


def draw(args: argparse.Namespace) -> None:
    """Draw :data:`PROMPTS` by every variant, and write the sheet to ``args.out``."""
    compute, repository = compute_of(args), complete_repository(MINIATURE / "ternary")
    results, file_bytes = {}, {}
    for variant, path in VARIANTS.items():
        size = sum(file.stat().st_size for file in tensor_files(MINIATURE / path))
        # What the bits cost, and with a LoRA beside the packed weights.
        for file in (None, RECOVERY[variant]) if variant in RECOVERY else (None,):
            name, loras = (f"{variant} + LoRA", [(load_lora(MINIATURE / file), 1.0)]) if file else (variant, [])
            results[name] = generate(repository, PROMPTS, compute, SIDE, SIDE, args.steps, args.seed,
                                     model=load(variant), progress=not args.json, loras=loras)
            file_bytes[name] = size + ((MINIATURE / file).stat().st_size if file else 0)
    save_png(sheet(results, file_bytes), {name: result.settings for name, result in results.items()}, args.out)
    if args.json:
        print(json.dumps({"out": str(args.out), "variants": {
            name: {"settings": result.settings, "stages": result.stages, "file_bytes": file_bytes[name]}
            for name, result in results.items()}}))
        return
    columns = {f"{name}, {file_bytes[name] / 1e6:.2f} MB": result.stages for name, result in results.items()}
    print(f"\n{cli.table(columns)}\n\n{args.out}: {len(PROMPTS)} prompts by {len(results)} variants of the miniature "
          f"on {compute.device}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description="Draw six prompts with the trained miniature, as a contact sheet.",
                                     parents=[options.sampling_options()])
    parser.add_argument("--out", type=options.png_path, default="bonsai-demo.png",
                        help="PNG file to write; replaced if it exists")
    return cli.run(draw, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
