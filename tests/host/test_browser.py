"""The real frontend in headless Chromium: every example workflow opens cleanly, and the first one makes an image.

With UPDATE_PICTURES=1 the pictures of the graphs in the repository are made anew; otherwise nothing in it changes.
"""

import asyncio
import itertools
import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image

from bonsai_image.tests.support.frontend import HEIGHT, WIDTH, Page, frontend, needs_chromium, server_of_a_user
from bonsai_image.tests.support.shipped import WORKFLOWS

pytestmark = needs_chromium

#: Where the graph begins in the window, clear of the menus.
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


async def drop(page: Page, workflow: str, name: str = "dropped") -> list[dict]:
    """Drag a file ``name``.json with this text into the window; the nodes that the frontend then has."""
    page.problems.clear()
    count = len(json.loads(workflow)["nodes"])
    await page.evaluate(f"{DROP}({json.dumps(workflow)}, '{name}.json')")
    await page.until(f"document.title.includes('{name}') && app.graph.nodes.length === {count}")
    await asyncio.sleep(2)  # dialogs and messages come a moment later
    return await page.evaluate(NODES)


@pytest.fixture(scope="module")
def server(comfyui, repository, binary_transformer, tmp_path_factory):
    with server_of_a_user(comfyui, repository, binary_transformer, tmp_path_factory.mktemp("browser")) as running:
        yield running


def overlaps(boxes: list[list[float]]) -> list[tuple]:
    """Pairs of boxes (x, y, width, height) that cover each other."""
    return [(a, b) for a, b in itertools.combinations(boxes, 2)
            if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]]


#: Both ends of every link.
LINKS = """[...app.graph.links.values()].map(link => [
    [...app.graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot)],
    [...app.graph.getNodeById(link.target_id).getInputPos(link.target_slot)]])"""


def hidden(links: list, boxes: list[list[float]]) -> list[tuple]:
    """Links that run behind a node: (start, end, box). They are the curves that LiteGraph draws, less their ends."""
    found = []
    for (x0, y0), (x3, y3) in links:
        x1, x2 = (end + sign * math.hypot(x3 - x0, y3 - y0) / 4 for end, sign in ((x0, 1), (x3, -1)))
        for step in range(101):
            t, u = step / 100, 1 - step / 100
            x = u**3 * x0 + 3 * u * u * t * x1 + 3 * u * t * t * x2 + t**3 * x3
            y = u**3 * y0 + 3 * u * u * t * y0 + 3 * u * t * t * y3 + t**3 * y3
            behind = [b for b in boxes if b[0] < x < b[0] + b[2] and b[1] < y < b[1] + b[3]]
            if behind and min(math.hypot(x - x0, y - y0), math.hypot(x - x3, y - y3)) > 25:
                found.append(((x0, y0), (x3, y3), behind[0]))
                break
    return found


async def complaints(page: Page, nodes: list[dict]) -> list[str]:
    """Everything the frontend has against the workflow that was just dropped."""
    text = await page.evaluate("document.body.innerText")
    dialogs = [line for line in text.splitlines() if any(word in line.lower() for word in COMPLAINTS)]
    return [*dialogs, *page.problems, *(f"{n['type']} is red" for n in nodes if n["errors"] or not n["known"])]


@pytest.mark.parametrize("modern", [False, True], ids=["canvas", "modern"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_without_errors(server, path, modern, tmp_path):
    async def scenario():
        async with frontend(server.url, tmp_path / "profile", modern) as page:
            assert not [problem for problem in page.problems if "bonsai" in problem.lower()]
            nodes = await drop(page, path.read_text(encoding="utf-8"), path.stem)
            assert not await complaints(page, nodes)
            boxes = [node["box"] for node in nodes]
            assert not overlaps(boxes)
            if not modern:
                assert not hidden(await page.evaluate(LINKS), boxes)
                clip = await page.evaluate(f"{PLACE}({LEFT}, {TOP})")
                await page.resize(max(WIDTH, clip["x"] + clip["width"]), max(HEIGHT, clip["y"] + clip["height"]))
                await asyncio.sleep(1)
                save_picture(path, await page.picture(clip), tmp_path)

    asyncio.run(scenario())


def save_picture(path: Path, graph: bytes, scratch: Path) -> None:
    """The graph, beside its workflow."""
    target = (path if os.environ.get("UPDATE_PICTURES") == "1" else scratch / path.name).with_suffix(".jpg")
    target.write_bytes(graph)
    assert Image.open(target).size[0] > 1000 and len(graph) < 300_000


def test_a_missing_node_is_noticed(server, tmp_path):
    """The check above can fail."""
    name = "BonsaiCheckpointLoader"
    workflow = WORKFLOWS[0].read_text(encoding="utf-8").replace(f'"{name}"', f'"{name}OfTomorrow"')

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            found = await complaints(page, await drop(page, workflow))
            assert "BonsaiCheckpointLoaderOfTomorrow is red" in found
            assert any("missing node" in line.lower() for line in found)

    asyncio.run(scenario())


#: Limits, by node title and name of the widget, that make a workflow quick here.
SMALL = {("Width", "value"): 64, ("Height", "value"): 48, ("Scale to multiples of 16", "megapixels"): 0.01,
         ("Empty Latent", "batch_size"): 2, ("Train LoRA", "steps"): 2}
SHRINK = """(limits => {
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
        const limit = limits[`${node.title}/${widget.name}`];
        if (limit !== undefined) widget.value = Math.min(widget.value, limit);
    }
})"""


#: The nodes that show what a workflow made.
RESULTS = ["SaveImage", "LossGraphNode"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_makes_an_image(server, path, tmp_path):
    before = set((server.base / "output").glob("*.png"))

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            await drop(page, path.read_text(encoding="utf-8"), path.stem)
            await page.evaluate(f"{SHRINK}({json.dumps({'/'.join(key): value for key, value in SMALL.items()})})")
            await page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
            await page.until(f"app.graph.nodes.find(node => {RESULTS}.includes(node.type)).imgs?.[0]?.complete", 300)
            assert not await complaints(page, await page.evaluate(NODES))

    asyncio.run(scenario())
    if path.stem == "7 LoRA training":
        assert len(list((server.base / "output" / "loras").glob("bonsai_lora_2_steps_*.safetensors"))) == 1
        return
    made = sorted(set((server.base / "output").glob("*.png")) - before)
    assert len(made) == (2 if path.stem == "6 Batch variations" else 1)
    for file in made:
        picture = Image.open(file)
        assert all(side % 16 == 0 and side < 200 for side in picture.size)
        assert len(set(picture.convert("L").tobytes())) > 10
        assert json.loads(picture.info["workflow"])["nodes"], "the image carries the workflow that made it"
