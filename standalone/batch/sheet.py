"""A contact sheet and a static page of a batch's images, from its manifest."""

import argparse
import html
import io
import math
import textwrap
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ...disk import write_whole
from ...loaders import ModelFileError
from .manifest import read

#: Pixels of a thumbnail's longer side, of its caption, and between them; images on the sheet at most.
_SIDE, _CAPTION, _MARGIN, _MOST = 192, 54, 10, 400
#: Characters of a caption's line, and lines.
_LINE, _LINES = 34, 3

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1.5rem }}
figure {{ margin: 0 }}
img {{ width: 100%; height: auto; background: #ddd }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0 .75rem; margin: .25rem 0 0; color: #666; font-size: 13px }}
dd {{ margin: 0; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>{count} images</p>
<main>
{figures}
</main>
</html>
"""
_SETTINGS = ("id", "seed", "steps", "reference", "lora", "lora_strength", "source", "dtype")


def run(args: argparse.Namespace) -> None:
    """Write ``sheet.png`` and ``index.html`` into a batch's output folder. Raises ModelFileError."""
    out = args.folder
    rows = sorted(read(out), key=lambda row: (row["prompt"], row["seed"], row["name"]))
    rows = [row for row in rows if (out / f"{row['name']}.png").exists()]
    if not rows:
        raise ModelFileError(out, "images with their manifest", "none", "give the folder that batch wrote to")
    sheet, page = out / "sheet.png", out / "index.html"
    stream = io.BytesIO()
    shown = rows[:_MOST]
    columns = math.ceil(math.sqrt(len(shown)))  # about as wide as high
    # Pillow closes each file when it has read it.
    images = ((Image.open(out / f"{row['name']}.png"), f"{row['prompt']}, seed {row['seed']}") for row in shown)
    contact(images, -(-len(shown) // columns), columns).save(stream, format="PNG")
    write_whole(sheet, stream.getvalue())
    figures = "\n".join(map(_figure, rows))
    text = _PAGE.format(title=html.escape(out.absolute().name), count=len(rows), figures=figures)
    write_whole(page, text.encode(errors="replace"))
    print(sheet, page, sep="\n")


def _figure(row: dict[str, Any]) -> str:
    hidden = {"lora_strength"} if not row["lora"] else set()
    shown = {"size": f"{row['width']} x {row['height']}"} | {
        key: row[key] for key in _SETTINGS if row[key] not in (None, "") and key not in hidden}
    facts = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in shown.items())
    prompt = html.escape(row["prompt"])
    return (f'<figure><a href="{row["name"]}.png"><img loading="lazy" src="{row["name"]}.png" width="{row["width"]}" '
            f'height="{row["height"]}" alt="{prompt}"></a><figcaption>{prompt}<dl>{facts}</dl></figcaption></figure>')


def contact(images: Iterable[tuple[Image.Image, str]], rows: int, columns: int) -> Image.Image:
    """Thumbnails of ``images``, row by row, above their captions."""
    step, rise = _SIDE + _MARGIN, _SIDE + _CAPTION + _MARGIN
    image = Image.new("RGB", (_MARGIN + columns * step, _MARGIN + rows * rise), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for i, (each, caption) in enumerate(images):
        left, top = _MARGIN + i % columns * step, _MARGIN + i // columns * rise
        each.thumbnail((_SIDE, _SIDE))
        image.paste(each, (left, top))
        lines = textwrap.wrap(caption, _LINE, max_lines=_LINES, placeholder=" ...")
        pen.multiline_text((left, top + _SIDE + 2), "\n".join(lines), "black", font, spacing=2)
    return image
