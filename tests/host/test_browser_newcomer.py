"""A newcomer's first hour: the README followed in the real frontend, from empty folders to an image, with a stopwatch.

SCREENSHOTS names a folder for what the window showed at each step and how long each took.
"""

import asyncio
import os
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path

import pytest

from bonsai_image.tests.host.test_browser import FIT
from bonsai_image.tests.host.test_browser_messages import DETAILS, PANEL, TOAST
from bonsai_image.tests.support.comfyui_server import Server
from bonsai_image.tests.support.frontend import OTHER_FRONTEND, Page, frontend, needs_chromium, skip_the_tour
from bonsai_image.tests.support.hub import Hub
from bonsai_image.tests.support.shipped import DOWNLOADED

pytestmark = needs_chromium

#: Clicks what has this text, or else this label.
CLICK = """((words) => {
    const shown = [...document.querySelectorAll('button, [role=button], h3, span')].filter(
        each => each.getBoundingClientRect().width);
    const found = shown.findLast(each => each.innerText?.trim() === words)
        ?? shown.find(each => each.ariaLabel === words);
    found?.click();
    return Boolean(found);
})"""
LOADER = "app.graph.nodes.find(node => node.type === 'BonsaiCheckpointLoader')?.widgets[0]"
#: A small image, because the model is one.
SMALL = """app.graph.nodes.filter(node => ['Width', 'Height'].includes(node.title))
    .forEach(node => { node.widgets[0].value = 64; })"""
IMAGE = "app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.complete"


class Stopwatch:
    """Prints the seconds since the step before, and keeps them with a picture of the page."""

    def __init__(self, folder: Path):
        self.folder, self.steps, self.began = folder, [], time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    async def step(self, name: str, page: Page | None = None) -> None:
        self.steps.append(f"{time.monotonic() - self.began:6.1f} s  {name}")
        print(self.steps[-1])
        if page:
            await asyncio.sleep(1.5)  # what fades in or is loaded late
            (self.folder / f"newcomer {len(self.steps)}, {name}.jpg").write_bytes(await page.picture())
        (self.folder / "newcomer.txt").write_text("\n".join(self.steps) + "\n")
        self.began = time.monotonic()


@pytest.fixture
def hub(repository):
    """The Hub with the miniature in the place of the ternary model."""
    server = Hub(DOWNLOADED, {file.relative_to(repository).as_posix(): file.read_bytes()
                              for file in repository.rglob("*") if file.is_file()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def click(page: Page, words: str) -> None:
    await page.until(f"{CLICK}('{words}')")


async def newcomer(server: Server, hub: Hub, tmp_path: Path) -> None:
    watch = Stopwatch(Path(os.environ.get("SCREENSHOTS", tmp_path)))
    await server.wait()
    await watch.step("the server answers")
    async with frontend(server.url, tmp_path / "profile", modern=True) as page:
        await page.resize(1366, 768)
        await watch.step("the frontend is there", page)
        await click(page, "Templates")
        await click(page, "bonsai-image")
        await page.until("document.body.innerText.includes('9 With Klein files')")
        await watch.step("our templates are listed", page)
        await click(page, "1 Text to image")
        await page.until(f"document.title.includes('1 Text to image') && Boolean({LOADER})")
        await page.evaluate(FIT)
        await watch.step("text to image is open", page)

        await click(page, "Run")
        command = re.match(r"Run (.*) in a terminal", await page.until(TOAST))[1]
        await watch.step("the error says what to do", page)
        await page.evaluate(f"{DETAILS}.click()")
        # The traceback stands there until the frontend has put its report together.
        await page.until(f"{PANEL}?.innerText.slice(0, 200).includes('Run /')")
        await watch.step("and so do its details", page)
        assert "download --variant ternary" in command

        # The published commit has other files than the miniature.
        done = await asyncio.to_thread(subprocess.run, [*shlex.split(command), "--revision", "main"],
                                       env=hub.environment(tmp_path), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        await watch.step("the command has downloaded the model")

        before = len(server.log.read_text())
        await page.evaluate("document.activeElement.blur()")
        for kind in ("keyDown", "keyUp"):
            await page.send("Input.dispatchKeyEvent", type=kind, key="r", code="KeyR", windowsVirtualKeyCode=82)
        await page.until(f"{LOADER}.options.values.length === 1 && {LOADER}.value === '{DOWNLOADED}'")
        await watch.step("R has found it", page)
        await page.evaluate(SMALL)
        await click(page, "Run")
        await page.until(IMAGE, 300)
        await watch.step("an image", page)
        assert "Error" not in server.log.read_text()[before:]
    (image,) = (server.base / "output").glob("*.png")
    assert image.stat().st_size > 1000


def test_the_readme_leads_from_empty_folders_to_an_image(comfyui, hub, tmp_path):
    server = Server(comfyui, tmp_path / "base", None, options=OTHER_FRONTEND)
    try:
        skip_the_tour(server)
        asyncio.run(newcomer(server, hub, tmp_path))
    finally:
        server.process.terminate()
        server.process.wait(30)
