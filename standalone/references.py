"""Reference images: what ``generate --image`` and the column ``reference`` of a batch read."""

from pathlib import Path

import numpy as np
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageOps

from ..loaders.errors import refusing

#: What diffusers raises ValueError about: sides below 64 pixels, more than 8:1.
check_size = Flux2ImageProcessor.check_image_input


def open_image(path: Path) -> Image.Image:
    """A reference image in RGB, turned as its EXIF orientation says; of an animation, the first frame.

    Grey of 16 bits or float is scaled, with white at 65535 or 1, as ComfyUI's Load Image does. Transparency lies on
    white, as viewers show it; Load Image shows the colors below it. Raises ModelFileError, also for a size that
    diffusers refuses.
    """
    # Pillow's decoders raise whatever they come across.
    with refusing(path, "an image of at least 64 x 64 pixels and at most 8:1", "choose a PNG or JPEG file", Exception):
        with Image.open(path) as file:
            if file.format in ("EPS", "WMF"):
                raise ValueError(f"{file.format}, drawn by a program")  # Pillow would start Ghostscript
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            image = _grey(image)
        elif image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return check_size(image.convert("RGB"))


def _grey(image: Image.Image) -> Image.Image:
    """16-bit or float grey in 8 bits, which Pillow itself would cut at 255. Its older versions read 16 bits as I."""
    values, white = np.asarray(image), 1 if image.mode == "F" else 65535
    if not 0 <= values.min() <= values.max() <= white:
        raise ValueError(f"values from {values.min()} to {values.max()} instead of 0 to {white}")
    values = np.where(values == image.info.get("transparency"), white, values)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
