"""The real frontend in headless Chromium: every example workflow opens cleanly, and makes an image.

What the window then shows is kept: SCREENSHOTS names a folder for it. COMFYUI_FRONTEND names another frontend.
"""

import asyncio
import itertools
import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image

from bonsai_image.tests.support.frontend import Page, frontend, needs_chromium, server_of_a_user
from bonsai_image.tests.support.shipped import WORKFLOWS

pytestmark = needs_chromium

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


#: Both ends of every part of a link, from reroute to reroute.
LINKS = """[...app.graph.links.values()].flatMap(link => {
    const reroutes = [];
    for (let id = link.parentId; id; id = app.graph.reroutes.get(id).parentId)
        reroutes.unshift([...app.graph.reroutes.get(id).pos]);
    const points = [[...app.graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot)], ...reroutes,
                    [...app.graph.getNodeById(link.target_id).getInputPos(link.target_slot)]];
    return points.slice(1).map((point, i) => [points[i], point]);
})"""


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


#: Windows as users have them, the smallest last.
SCREENS = [(1920, 1080), (1680, 1050), (1366, 768)]
FIT = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
#: Of every node, the title, box and box of the group that holds its upper left corner.
INSIDE = """app.graph.nodes.map(node => [node.title, [...node.boundingRect], app.graph.groups.map(group =>
    [...group.boundingRect]).find(box => box[0] <= node.pos[0] && box[1] <= node.pos[1]
        && node.pos[0] < box[0] + box[2] && node.pos[1] < box[1] + box[3])])"""


async def misplaced(page: Page) -> list:
    """Nodes that cover each other or leave their groups."""
    nodes = await page.evaluate(INSIDE)
    return overlaps([box for _, box, _ in nodes]) + [
        (title, box, group) for title, box, group in nodes
        if not group or box[0] + box[2] > group[0] + group[2] or box[1] + box[3] > group[1] + group[3]]


#: Of every note, what scrolls in it: what a reader does not see at once.
SCROLLING = """[...document.querySelectorAll('.comfy-markdown .ProseMirror, .comfy-markdown-content')].flatMap(
    note => [note, ...note.querySelectorAll('*')].filter(part => part.clientWidth && (
        part.scrollWidth > part.clientWidth || part === note && part.scrollHeight > part.clientHeight
    )).map(part => `scrolls: ${part.textContent}`))"""
#: Puts Bonsai Model Info below the graph, in a group no larger than needed.
DESCRIBE = """(() => {
    const info = LiteGraph.createNode('BonsaiModelInfo'), group = new LiteGraph.LGraphGroup('Info');
    const bottom = Math.max(...app.graph.groups.map(group => group.pos[1] + group.size[1]));
    app.graph.add(info);
    info.pos = [16, bottom + 80];
    app.graph.nodes.find(node => /Bonsai(Checkpoint|Model)Loader/.test(node.type)).connect(0, info, 0);
    group.pos = [0, bottom + 10];
    group.size = [info.size[0] + 32, info.size[1] + 86];
    app.graph.add(group);
})()"""


async def unread(page: Page) -> list:
    """What cannot be read, in any of the windows, after *Fit view*."""
    found = []
    for screen in SCREENS:
        await page.resize(*screen)
        await asyncio.sleep(0.3)
        await page.evaluate(FIT)
        await asyncio.sleep(0.7)
        found += [f"no text at {screen}"] if await page.evaluate("app.canvas.low_quality") else []
        found += await page.evaluate(SCROLLING)
    return found


#: Limits, by node title and name of the widget, that make a workflow quick here.
SMALL = {("Width", "value"): 64, ("Height", "value"): 48, ("Scale to multiples of 16", "megapixels"): 0.01,
         ("Empty Latent", "batch_size"): 2, ("Train LoRA", "steps"): 2}
SHRINK = """(limits => {
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
        const limit = limits[`${node.title}/${widget.name}`];
        if (limit !== undefined) widget.value = Math.min(widget.value, limit);
    }
})"""
#: How many runs have ended.
JOBS = "fetch('/history').then(reply => reply.json()).then(jobs => Object.keys(jobs).length)"
#: ComfyUI's own loader of the text encoder wants one of full size; test_own_loaders.py draws with a smaller one.
NOT_HERE = ["9 With Klein files"]


@pytest.mark.parametrize("modern", [False, True], ids=["canvas", "modern"])
def test_every_workflow_opens_cleanly_and_makes_an_image(server, modern, tmp_path):
    """And everything keeps its place. What a user sees is kept as images, in a folder that SCREENSHOTS may name."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    found = {}

    async def scenario():
        async with frontend(server.url, tmp_path / "profile", modern) as page:
            assert not [problem for problem in page.problems if "bonsai" in problem.lower()]
            for path in WORKFLOWS:
                async def shoot(when: str, stem: str = path.stem) -> None:
                    await asyncio.sleep(1)
                    name = f"{stem}, {'Nodes 2.0' if modern else 'canvas'}, {when}.jpg"
                    (folder / name).write_bytes(await page.picture())

                nodes = await drop(page, path.read_text(encoding="utf-8"), path.stem)
                found[path.stem] = problems = [*await complaints(page, nodes), *await misplaced(page)]
                if not modern:
                    problems += hidden(await page.evaluate(LINKS), [node["box"] for node in nodes])
                problems += await unread(page)
                await shoot("opened")
                await page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
                await shoot("light theme")
                await page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
                if path.stem not in NOT_HERE:
                    await page.evaluate(DESCRIBE)
                    problems += await run_small(page, path, server.base / "output")
                    await shoot("after a run")
                    problems += [*await complaints(page, await page.evaluate(NODES)), *await misplaced(page)]

    asyncio.run(scenario())
    assert not {name: problems for name, problems in found.items() if problems}


async def run_small(page: Page, path: Path, output: Path) -> list[str]:
    """Run the workflow at a small size; what is wrong with the files that it makes."""
    before = set(output.rglob("*.*"))
    await page.evaluate(f"{SHRINK}({json.dumps({'/'.join(key): value for key, value in SMALL.items()})})")
    jobs = await page.evaluate(JOBS)
    await page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    await page.until(f"{JOBS}.then(jobs => jobs > {jobs})", 300)
    made = sorted(set(output.rglob("*.*")) - before)
    if path.stem == "7 LoRA training":
        return [] if [file.match("loras/bonsai_lora_2_steps_*.safetensors") for file in made] == [True] else made
    found = [] if len(made) == (2 if path.stem == "6 Batch variations" else 1) else [f"made {made}"]
    for file in made:
        picture = Image.open(file)
        if any(side % 16 or side >= 200 for side in picture.size) or len(set(picture.convert("L").tobytes())) <= 10:
            found.append(f"{file}: {picture.size}, or of one colour")
        if not json.loads(picture.info["workflow"])["nodes"]:
            found.append(f"{file} does not carry the workflow that made it")
    return found


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
