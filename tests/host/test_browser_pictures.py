"""The thumbnails of the example workflows and the README's graph: drawn by the trained miniature in the real frontend.

With UPDATE_PICTURES=1 those in the repository are made anew; otherwise nothing in it changes.
"""

import asyncio
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from bonsai_image.miniature import demo
from bonsai_image.miniature.train.scenes import Scene, draw
from bonsai_image.tests.host.test_browser import JOBS, drop
from bonsai_image.tests.support.comfyui_server import ROOT
from bonsai_image.tests.support.frontend import frontend, needs_chromium, server_of_a_user
from bonsai_image.tests.support.shipped import FILES, WORKFLOWS

pytestmark = needs_chromium

SIDE = demo.SIDE
SOURCE = Scene("bonsai", "red", "white")
PROMPTS = {"5 Image to image": demo.PROMPTS[1], "8 Reference edit": SOURCE.edit("blue")[0]}
#: What is put into every graph, by node title and widget. The title of the last node says who has drawn.
MINIATURE = "By the miniature"
FILL = """(values => {
    for (const node of app.graph.nodes) {
        for (const widget of node.widgets ?? []) {
            const value = values[`${node.title}/${widget.name}`];
            if (value !== undefined) widget.value = value;
        }
        if (node.title === 'First LoRA') node.mode = 0;
        if (node.type === 'SaveImage') node.title = values.title;
    }
})"""
#: Draws the groups whose titles begin with one of ``titles`` (none: all), or the node of the images closely; the part
#: of the page they cover.
PLACE = """((titles, closely) => {
    const shown = group => !titles.length || titles.some(title => group.title.startsWith(title));
    const save = app.graph.nodes.find(node => node.type === 'SaveImage');
    const rows = closely ? Math.sqrt(save.imgs.length) : 1, scale = closely ? 3 / rows : 1;
    if (closely) save.setSize([60 + 128 * rows, Math.max(270, 70 + 128 * rows)]);
    const boxes = closely ? [[save.pos[0], save.pos[1] - 30, save.size[0], save.size[1] + 30]]
        : app.graph.groups.filter(shown).map(group => [...group.boundingRect]);
    const x = Math.min(...boxes.map(b => b[0])), y = Math.min(...boxes.map(b => b[1]));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [80 / scale - x, 120 / scale - y];
    app.canvas.ds.onChanged?.(scale, app.canvas.ds.offset);
    app.canvas.setDirty(true, true);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return {x: corner.x + 70, y: corner.y + 110, scale: 1,
            width: scale * (Math.max(...boxes.map(b => b[0] + b[2])) - x) + 20,
            height: scale * (Math.max(...boxes.map(b => b[1] + b[3])) - y) + 20};
})"""


@pytest.fixture(scope="module")
def server(comfyui, repository, binary_transformer, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    node = root / "base" / "custom_nodes" / "miniature_nodes.py"
    node.parent.mkdir(parents=True)
    node.symlink_to(ROOT / "tests" / "support" / "miniature_nodes.py")
    with server_of_a_user(comfyui, repository, binary_transformer, root) as running:
        pixels = ((draw(SOURCE) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(running.base / "input" / "example.png")
        (running.base / "models" / "loras").mkdir(exist_ok=True)
        (running.base / "models" / "loras" / FILES["loras"][0]).symlink_to(demo.MINIATURE / "blue_pot_lora.safetensors")
        yield running


def test_the_miniature_draws_every_thumbnail(server, tmp_path):
    update = os.environ.get("UPDATE_PICTURES") == "1"

    def keep(target: Path, picture: bytes) -> None:
        target = target if update else tmp_path / target.name
        target.write_bytes(picture)
        assert Image.open(target).size[0] > 400 and len(picture) < 300_000

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            await page.resize(2400, 1300)
            for path in WORKFLOWS:
                await drop(page, path.read_text(encoding="utf-8"), path.stem)
                part = ["4. The LoRA", "3. Training"], False
                if path.stem != "7 LoRA training":
                    part = [], True
                    values = {"Prompt/text": PROMPTS.get(path.stem, demo.PROMPTS[0]), "Width/value": SIDE,
                              "Height/value": SIDE, "Seed/noise_seed": 2, "title": MINIATURE,
                              "Seed/control_after_generate": "fixed",
                              "Scale to multiples of 16/megapixels": SIDE * SIDE / 2**20, "Steps/steps": 4}
                    await page.evaluate(f"{FILL}({json.dumps(values)})")
                    jobs = await page.evaluate(JOBS)
                    await page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
                    await page.until(f"{JOBS}.then(jobs => jobs > {jobs})", 120)
                    await page.until("app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.complete")
                await asyncio.sleep(5)  # the message that the job has ended covers a part
                graph = {ROOT / "docs" / "images" / "graph.jpg": ([], False)} if path == WORKFLOWS[0] else {}
                for target, seen in {**graph, path.with_suffix(".jpg"): part}.items():
                    clip = await page.evaluate(f"{PLACE}(...{json.dumps(seen)})")
                    await asyncio.sleep(1)
                    keep(target, await page.picture(clip))

    asyncio.run(scenario())
