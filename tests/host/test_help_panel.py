"""The help page of every node, opened in the real frontend as a user opens it, with its picture.

With UPDATE_PICTURES=1 the pictures of the nodes and of the panel are made anew; otherwise nothing in the repository
changes.
"""

import asyncio
import io
import json
import os

import pytest
from PIL import Image

from bonsai_image.tests.support.comfyui_server import ROOT
from bonsai_image.tests.support.frontend import frontend, needs_chromium, server_of_a_user
from bonsai_image.tests.support.shipped import SCHEMAS

pytestmark = needs_chromium

#: Puts one node alone on the canvas.
ALONE = """((type, width) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.setSize([width, node.computeSize()[1]]);
    node.pos = [120, 200];
    app.canvas.deselectAll();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
})"""
#: The part of the page that it covers once it is drawn, with its badge.
COVERED = """(() => {
    const corner = app.canvas.canvas.getBoundingClientRect(), box = app.graph.nodes[0].boundingRect;
    return {x: corner.x + box[0] - 12, y: corner.y + box[1] - 28, width: box[2] + 24, height: box[3] + 40, scale: 1};
})()"""
#: Selects it and presses the i in the bar that appears above it.
SELECT = "app.canvas.selectNode(app.graph.nodes[0])"
BUTTON = "document.querySelector('[data-testid=\"info-button\"]')"
PAGE = "document.querySelector('.node-help-content')"


@pytest.fixture(scope="module")
def server(comfyui, repository, binary_transformer, tmp_path_factory):
    with server_of_a_user(comfyui, repository, binary_transformer, tmp_path_factory.mktemp("help")) as running:
        yield running


def test_help_page_shows_the_picture_of_its_node(server, tmp_path):
    update = os.environ.get("UPDATE_PICTURES") == "1"

    async def scenario():
        async with frontend(server.url, tmp_path / "profile") as page:
            await page.resize(1400, 800)
            for node, schema in SCHEMAS.items():
                await page.evaluate(f"{ALONE}('{node}', 400)")
                await asyncio.sleep(1)
                drawn = await page.picture(await page.evaluate(COVERED))
                stored = ROOT / "web" / "docs" / f"{node}.jpg"
                if update:
                    stored.write_bytes(drawn)
                # An input more or less changes the height.
                assert Image.open(stored).size == Image.open(io.BytesIO(drawn)).size, "made of an older node"
                assert len(set(Image.open(stored).convert("L").tobytes())) > 100, "nothing in it"

                await page.evaluate(SELECT)
                await page.until(f"Boolean({BUTTON})")
                await page.evaluate(f"{BUTTON}.click()")
                title = json.dumps(schema.display_name)
                await page.until(f"{PAGE}?.querySelector('h1')?.textContent === {title}")
                assert await page.until(f"{PAGE}.querySelector('img')?.naturalWidth") == Image.open(stored).width
                if update and node == "BonsaiCheckpointLoader":
                    (ROOT / "docs" / "images" / "help.jpg").write_bytes(await page.picture())

    asyncio.run(scenario())
