"""Reference images of every mode, as the model sees them: ``generate --image`` and the column ``reference``."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bonsai_image.standalone import generate as generating
from bonsai_image.standalone.references import open_image
from bonsai_image.tests.support.batch_runs import batch, write_table
from bonsai_image.tests.support.command_line import MINIATURE, SMALL, run, sentence

SIDE = 64
GREY16 = np.array([[0, 257, 25700, 65535]], np.uint16)


def wide(image: Image.Image) -> Image.Image:
    """Four columns of pixels, each 16 wide."""
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def pixels(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (4, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return wide(image)


def palette(transparency=None) -> Image.Image:
    image = pixels("P", 0, 1, 2, 3)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.info |= {} if transparency is None else {"transparency": transparency}
    return image


def animation() -> tuple[Image.Image, dict]:
    return pixels("RGB", *COLORS), {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "blue")]}


def grey16_png(key: int | None) -> bytes:
    """A 16-bit PNG, optionally with a transparent value, which Pillow does not write."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.repeat(GREY16, SIDE, 0).repeat(16, 1).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0))
            + (b"" if key is None else chunk(b"tRNS", struct.pack(">H", key)))
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
GREYS = [(grey,) * 3 for grey in (0, 1, 100, 255)]
CASES = {
    "rgb": (pixels("RGB", *COLORS), "png", COLORS),
    "8-bit grey": (pixels("L", 0, 1, 100, 255), "png", GREYS),
    "1-bit": (pixels("1", 0, 1, 0, 1), "png", [(0,) * 3, (255,) * 3] * 2),
    "16-bit grey": (grey16_png(None), "png", GREYS),
    "16-bit grey with a transparent value": (grey16_png(25700), "png", [*GREYS[:2], (255,) * 3, GREYS[3]]),
    "16-bit grey TIFF": (wide(Image.fromarray(GREY16)), "tiff", GREYS),
    "16-bit grey in mode I": (wide(Image.fromarray(GREY16.astype(np.int32))), "tiff", GREYS),
    "big-endian 16-bit grey": (b"P5 64 64 65535\n" + np.repeat(GREY16, SIDE, 0).repeat(16, 1).astype(">u2").tobytes(),
                               "pgm", GREYS),
    "float": (wide(Image.fromarray((GREY16 / 65535).astype(np.float32))), "tiff", GREYS),
    "cmyk": (pixels("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (246, 246, 246, 0)), "tiff", COLORS),
    "palette": (palette(), "png", COLORS),
    "palette with a transparent color": (palette(1), "gif", [COLORS[0], (255,) * 3, *COLORS[2:]]),
    "palette with alpha": (palette(bytes([255, 0, 128, 255])), "png",
                           [COLORS[0], (255,) * 3, (127, 127, 255), COLORS[3]]),
    "grey with alpha": (pixels("LA", (0, 255), (0, 0), (0, 128), (9, 255)), "png",
                        [(0,) * 3, (255,) * 3, (127,) * 3, (9,) * 3]),
    "rgba": (pixels("RGBA", (255, 0, 0, 255), (0, 255, 0, 0), (0, 0, 255, 128), (9, 9, 9, 255)), "png",
             [COLORS[0], (255,) * 3, (127, 127, 255), COLORS[3]]),
    "animated gif": (*animation(), COLORS), "animated png": (*animation(), COLORS),
}


def written(path: Path, source: Image.Image | bytes, **options) -> Path:
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        source.save(path, **options)
    return path


@pytest.mark.parametrize("name", CASES)
def test_every_mode_is_read_as_a_viewer_shows_it(name, tmp_path):
    source, how, expected = CASES[name]
    suffix, options = (how, {}) if isinstance(how, str) else (name[-3:], how)
    image = open_image(written(tmp_path / f"a.{suffix}", source, **options))
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
    assert [image.getpixel((8 + 16 * x, 32)) for x in range(4)] == expected


@pytest.mark.parametrize("name", ["rgb", "16-bit grey TIFF", "palette with alpha", "rgba", "float"])
def test_exif_orientation_is_applied_in_every_mode(name, tmp_path):
    """6: to be turned by 90 degrees clockwise, so what was on the left is at the top."""
    source, suffix, expected = CASES[name]
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(written(tmp_path / f"a.{suffix}", source, exif=exif))
    assert [image.getpixel((32, 8 + 16 * y)) for y in range(4)] == expected


def encoded(source: Image.Image, suffix: str) -> bytes:
    stream = io.BytesIO()
    source.save(stream, suffix)
    return stream.getvalue()


UNUSABLE = {
    "too small": (encoded(Image.new("RGB", (63, 200)), "png"), "63\xd7200"),
    "too long": (encoded(Image.new("RGB", (64, 513)), "png"), "64\xd7513"),
    "no image": (b"nothing", "cannot identify image"),
    "cut off": (encoded(Image.effect_noise((64, 64), 99).convert("RGB"), "jpeg")[:900], "truncated"),
    "float beyond 1": (encoded(Image.new("F", (64, 64), 812.0), "tiff"), "812.0"),
    "not a number": (encoded(Image.new("F", (64, 64), float("nan")), "tiff"), "nan"),
    "32 bits": (encoded(Image.new("I", (64, 64), 70000), "tiff"), "70000"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n", "EPS"),
    "no bytes": (b"", "cannot identify image"),
}


@pytest.fixture
def unusable(tmp_path, monkeypatch) -> dict[str, Path]:
    for module, name in ((generating.loaders, "load_text_encoder"), (generating, "encode")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded"))
    return {name: written(tmp_path / f"{name}.png", content) for name, (content, _) in UNUSABLE.items()}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_a_reference_is_said_before_anything_is_loaded(name, unusable, tmp_path, capsys):
    assert run("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "a", *SMALL, "--image", unusable[name],
               "--out", tmp_path / "out.png") == 2
    said = sentence(capsys)
    assert str(unusable[name]) in said and UNUSABLE[name][1] in said


def test_a_row_with_such_a_reference_fails_alone_without_being_encoded(unusable, tmp_path, capsys):
    table = write_table(tmp_path / "a.jsonl", [{"prompt": "a", "reference": path.name} for path in unusable.values()])
    assert batch(table, tmp_path / "out") == 1
    said = capsys.readouterr()
    for number, path in enumerate(unusable.values(), 1):
        assert f"row {number} of a.jsonl: {path}: expected an image" in said.err
    assert f"{len(unusable)} failed" in said.out


def test_images_of_a_library_user_are_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(generating.loaders, "load_text_encoder", lambda *_: pytest.fail("loaded"))
    repository = generating.complete_repository(MINIATURE / "ternary")
    with pytest.raises(ValueError, match="Image too small: 63"):
        generating.generate(repository, ["a"], generating.Compute("cpu", None), 64, 64,
                            images=[Image.new("RGB", (63, 64))])
