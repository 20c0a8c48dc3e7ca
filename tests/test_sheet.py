"""The contact sheet and the page of a batch; the page as Chromium shows it. With UPDATE_IMAGES=1 its screenshot is kept
in docs/images."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from bonsai_image.standalone.batch import manifest
from bonsai_image.standalone.cli import main

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None,
                                    reason="no Chromium on the path (Debian: apt-get install chromium)")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--hide-scrollbars", "--virtual-time-budget=5000"]
PROMPTS = ("a bonsai tree with pink leaves in a blue pot on a grey background",
           "three red circles on a white background", "a large yellow ring at the top left on a grey background",
           '<script>alert("a & b")</script>')
#: Replaces the page by what the browser made of it.
PROBE = """<script>addEventListener("load", () => document.body.textContent = JSON.stringify({
    prompts: [...document.querySelectorAll("figcaption")].map(each => each.firstChild.textContent),
    facts: [...document.querySelectorAll("dl")].map(each => each.textContent),
    sizes: [...document.images].map(each => each.naturalWidth),
    scripts: document.scripts.length, wide: document.documentElement.scrollWidth > innerWidth}))</script>"""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sheet") / "bonsai & pots"
    folder.mkdir()
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["batch", prompts, "--out", folder, "--checkpoint", ROOT / "miniature" / "ternary", "--seeds", 2,
             "--width", 128, "--height", 128, "--device", "cpu", "--dtype", "fp32", "--threads", 1, "--shards", "1/1"]
    assert main([str(word) for word in words]) == 0
    assert main(["sheet", str(folder)]) == 0
    return folder


def test_the_sheet_has_every_image(out):
    rows = sorted(manifest.read(out), key=lambda row: (row["prompt"], row["seed"], row["name"]))
    image = Image.open(out / "sheet.png")
    for i, row in enumerate(rows):
        left, top = 10 + i % 3 * 202, 10 + i // 3 * 256
        assert image.crop((left, top, left + 128, top + 128)).tobytes() == \
            Image.open(out / f"{row['name']}.png").tobytes()


def test_a_folder_without_images_is_one_sentence(tmp_path, capsys):
    assert main(["sheet", str(tmp_path)]) == 2
    assert "expected images with their manifest, found none" in capsys.readouterr().err


def chromium(folder: Path, *words) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_image_with_its_prompt_and_settings(out, tmp_path, width):
    page = out / "probe.html"
    page.write_text((out / "index.html").read_text().replace('loading="lazy"', "") + PROBE)
    dom = chromium(tmp_path, f"--window-size={width},900", "--dump-dom", page.as_uri())
    seen = json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.S)[1]))
    assert seen["prompts"] == [prompt for prompt in sorted(PROMPTS) for _ in range(2)]
    assert seen["sizes"] == [128] * 8 and seen["scripts"] == 1 and not seen["wide"]
    assert all("size128 x 128" in facts and f"seed{i % 2}" in facts for i, facts in enumerate(seen["facts"]))


@needs_chromium
def test_the_page_as_a_picture(out, tmp_path):
    chromium(tmp_path, "--window-size=1200,900", f"--screenshot={tmp_path / 'page.png'}", (out / "index.html").as_uri())
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert len(set(picture.get_flattened_data())) > 1000, "no images on the page"
    if os.environ.get("UPDATE_IMAGES"):
        picture.save(ROOT / "docs" / "images" / "batch-page.jpg", quality=80)
