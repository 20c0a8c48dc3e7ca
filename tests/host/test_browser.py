"""The real frontend in headless Chromium: every example workflow opens cleanly, and the first one makes an image.

With UPDATE_PICTURES=1 the pictures of the graphs in the repository are made anew; otherwise nothing in it changes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest
from PIL import Image
from test_server import ROOT, Server
from test_workflows import DOWNLOADED, FILES, WORKFLOWS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-port=0"]
#: A user who has seen the tour, and a canvas without anything drawn over the graph.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
            "Comfy.Graph.CanvasMenu": False}
#: The window, larger where a graph needs it, and where the graph begins in it, clear of the menus.
WIDTH, HEIGHT = 2300, 1060
LEFT, TOP = 80, 120
#: What the frontend writes over a workflow that it does not like.
COMPLAINTS = ("missing node", "missing model", "error found", "errors found", "is not installed", "isn't installed")

DROP = """((text, name) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], name, {type: 'application/json'}));
    document.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
})"""
NODES = """app.graph.nodes.map(node => ({
    id: Number(node.id), type: node.type, known: node.type in LiteGraph.registered_node_types,
    box: [...node.boundingRect], errors: Boolean(node.has_errors)}))"""
#: Draws the graph unscaled, from the point (LEFT, TOP) on; the part of the page that it then covers.
PLACE = """((left, top) => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map(item => [...item.boundingRect]);
    const x = Math.min(...boxes.map(b => b[0])), y = Math.min(...boxes.map(b => b[1]));
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [left - x, top - y];
    app.canvas.setDirty(true, true);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return {x: corner.x + left - 20, y: corner.y + top - 20, scale: 1,
            width: Math.max(...boxes.map(b => b[0] + b[2])) - x + 40,
            height: Math.max(...boxes.map(b => b[1] + b[3])) - y + 40};
})"""


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


async def drop(page: Page, workflow: str, name: str = "dropped") -> list[dict]:
    """Drag a file ``name``.json with this text into the window; the nodes that the frontend then has."""
    page.problems.clear()
    count = len(json.loads(workflow)["nodes"])
    await page.evaluate(f"{DROP}({json.dumps(workflow)}, '{name}.json')")
    await page.until(f"document.title.includes('{name}') && app.graph.nodes.length === {count}")
    await asyncio.sleep(2)  # dialogs and messages come a moment later
    return await page.evaluate(NODES)


@pytest.fixture(scope="module")
def server(comfyui, pack, binary_transformer, tmp_path_factory):
    """The server of a user who has downloaded what the notes name (here: the miniature), but no LoRA yet."""
    root = tmp_path_factory.mktemp("browser")
    (root / DOWNLOADED).symlink_to(pack, target_is_directory=True)
    running = Server(comfyui, root / "base", root / DOWNLOADED)
    parts = {"diffusion_models": binary_transformer,
             "text_encoders": pack / "text_encoder-mlx-4bit" / "model.safetensors",
             "vae": pack / "vae" / "diffusion_pytorch_model.safetensors"}
    for kind, part in parts.items():
        (running.base / "models" / kind).mkdir(exist_ok=True)
        (running.base / "models" / kind / FILES[kind]).symlink_to(part)
    (running.base / "input").mkdir(exist_ok=True)
    shutil.copy(comfyui / "input" / "example.png", running.base / "input")
    try:
        settings = running.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS))
        asyncio.run(running.wait())
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


def overlaps(boxes: list[list[float]]) -> list[tuple]:
    """Pairs of boxes (x, y, width, height) that cover each other."""
    return [(a, b) for a, b in itertools.combinations(boxes, 2)
            if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]]


async def complaints(page: Page, nodes: list[dict]) -> list[str]:
    """Everything the frontend has against the workflow that was just dropped."""
    text = await page.evaluate("document.body.innerText")
    dialogs = [line for line in text.splitlines() if any(word in line.lower() for word in COMPLAINTS)]
    return [*dialogs, *page.problems, *(f"{n['type']} is red" for n in nodes if n["errors"] or not n["known"])]


@pytest.mark.parametrize("modern", [False, True], ids=["canvas", "modern"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_without_a_complaint(server, path, modern, tmp_path):
    async def scenario():
        async with frontend(server.url, tmp_path / "profile", modern) as page:
            assert not [problem for problem in page.problems if "bonsai" in problem.lower()]
            nodes = await drop(page, path.read_text(encoding="utf-8"), path.stem)
            assert not await complaints(page, nodes)
            assert not overlaps([node["box"] for node in nodes])
            if not modern:
                clip = await page.evaluate(f"{PLACE}({LEFT}, {TOP})")
                await page.resize(max(WIDTH, clip["x"] + clip["width"]), max(HEIGHT, clip["y"] + clip["height"]))
                await asyncio.sleep(1)
                save_pictures(path, await page.picture(), await page.picture(clip), tmp_path)

    asyncio.run(scenario())


def save_pictures(path: Path, window: bytes, graph: bytes, scratch: Path) -> None:
    """The graph beside its workflow, and the window around the first one for the README."""
    update = os.environ.get("UPDATE_PICTURES") == "1"
    pictures = {path.with_suffix(".jpg"): graph}
    if path.stem == "text_to_image":
        pictures[ROOT / "docs" / "images" / "graph.jpg"] = window
    for place, content in pictures.items():
        target = place if update else scratch / place.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        assert Image.open(target).size[0] > 1000 and len(content) < 300_000


def test_a_missing_node_is_noticed(server, tmp_path):
    """The check above can fail."""
    workflow = WORKFLOWS[0].read_text(encoding="utf-8").replace('"BonsaiPackLoader"', '"BonsaiPackLoaderOfTomorrow"')

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            found = await complaints(page, await drop(page, workflow))
            assert "BonsaiPackLoaderOfTomorrow is red" in found
            assert any("missing node" in line.lower() for line in found)

    asyncio.run(scenario())


#: Limits, by node title and name of the widget, that make a workflow quick here.
SMALL = {("Width", "value"): 64, ("Height", "value"): 48, ("Scale to multiples of 16", "megapixels"): 0.01,
         ("Empty Latent", "batch_size"): 2}
SHRINK = """(limits => {
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
        const limit = limits[`${node.title}/${widget.name}`];
        if (limit !== undefined) widget.value = Math.min(widget.value, limit);
    }
})"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_makes_an_image(server, path, tmp_path):
    before = set((server.base / "output").glob("*.png"))

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            await drop(page, path.read_text(encoding="utf-8"), path.stem)
            await page.evaluate(f"{SHRINK}({json.dumps({'/'.join(key): value for key, value in SMALL.items()})})")
            await page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
            await page.until("app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.complete", 300)
            assert not await complaints(page, await page.evaluate(NODES))

    asyncio.run(scenario())
    made = sorted(set((server.base / "output").glob("*.png")) - before)
    assert len(made) == (2 if path.stem == "batch_variations" else 1)
    for file in made:
        picture = Image.open(file)
        assert all(side % 16 == 0 and side < 200 for side in picture.size)
        assert len(set(picture.convert("L").tobytes())) > 10
        assert json.loads(picture.info["workflow"])["nodes"], "the image carries the workflow that made it"
