"""The real frontend in headless Chromium, for the tests that look at it."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from bonsai_image.tests.support.comfyui_server import Server
from bonsai_image.tests.support.shipped import DOWNLOADED, FILES, TRAINING

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None,
                                    reason="no Chromium on the path (Debian: apt-get install chromium)")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-port=0"]
#: A user who has seen the tour, and a canvas without anything drawn over the graph.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
            "Comfy.Graph.CanvasMenu": False}
#: Another frontend than that of the installed package: ``COMFYUI_FRONTEND`` is the folder ``static`` of its wheel.
OTHER_FRONTEND = ("--front-end-root", os.environ["COMFYUI_FRONTEND"]) if "COMFYUI_FRONTEND" in os.environ else ()
#: The window, larger where a graph needs it.
WIDTH, HEIGHT = 2300, 1060


class Page:
    """One tab, driven through the DevTools protocol; ``problems`` collects the console's errors as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._ids, self._answers = socket, itertools.count(1), {}
        self.problems: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(data["params"]["exceptionDetails"])[:1000])
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                self.problems.append(f"{data['params']['entry']['text']} {data['params']['entry'].get('url')}")
            elif data["method"] == "Runtime.consoleAPICalled" and data["params"]["type"] in ("error", "assert"):
                self.problems.append(json.dumps(data["params"]["args"])[:1000])

    async def send(self, method: str, **params) -> dict:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in answer, answer
        return answer["result"]

    async def evaluate(self, expression: str):
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (value := await self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}"
            await asyncio.sleep(0.2)
        return value

    async def resize(self, width: float, height: float) -> None:
        await self.send("Emulation.setDeviceMetricsOverride", width=round(width), height=round(height),
                        deviceScaleFactor=1, mobile=False)

    async def picture(self, clip: dict | None = None) -> bytes:
        """A JPEG of the page, or of the part ``clip`` of it."""
        part = {"clip": clip} if clip else {}
        answer = await self.send("Page.captureScreenshot", format="jpeg", quality=78, **part)
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def frontend(url: str, profile: Path, modern: bool = False):
    """The frontend, loaded and at rest, as a :class:`Page`; ``modern`` chooses between its two ways to draw nodes."""
    log = (profile.parent / f"{profile.name}.log").open("w")
    chromium = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}"],
                                stdout=log, stderr=subprocess.STDOUT)
    try:
        ready = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not ready.exists() or not ready.read_text().strip():
            assert chromium.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            await asyncio.sleep(0.1)
        devtools = f"http://127.0.0.1:{ready.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{devtools}/json/list") as reply:
                tab = next(target for target in await reply.json() if target["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                listener = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                await page.resize(WIDTH, HEIGHT)
                await page.send("Page.navigate", url=url)
                await page.until("Boolean(window.app?.graph?.nodes?.length && app.extensionManager)", 120)
                await page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(modern)})")
                await asyncio.sleep(3)  # the frontend's own start-up messages, about its default graph
                yield page
                listener.cancel()
    finally:
        chromium.terminate()
        chromium.wait(30)
        log.close()


def skip_the_tour(server: Server) -> None:
    """Give the only user SETTINGS, before the frontend is opened."""
    settings = server.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS))


@contextlib.contextmanager
def server_of_a_user(comfyui: Path, repository: Path, binary_transformer: Path, root: Path) -> Iterator[Server]:
    """The server of a user who has downloaded what the notes name (here: the miniature), but no LoRA yet."""
    (root / DOWNLOADED).symlink_to(repository, target_is_directory=True)
    running = Server(comfyui, root / "base", root / DOWNLOADED, options=OTHER_FRONTEND)
    parts = {"diffusion_models": binary_transformer,
             "text_encoders": repository / "text_encoder-mlx-4bit" / "model.safetensors",
             "vae": repository / "vae" / "diffusion_pytorch_model.safetensors"}
    for kind, part in parts.items():
        (running.base / "models" / kind).mkdir(exist_ok=True)
        for name in FILES[kind]:
            (running.base / "models" / kind / name).symlink_to(part)
    images = running.base / "input" / TRAINING
    images.mkdir(parents=True)
    shutil.copy(comfyui / "input" / "example.png", images.parent)
    for number in range(2):
        shutil.copy(comfyui / "input" / "example.png", images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"caption {number}")
    try:
        skip_the_tour(running)
        asyncio.run(running.wait())
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)
