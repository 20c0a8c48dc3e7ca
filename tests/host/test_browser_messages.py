"""What the nodes say, read where a user of the real frontend looks for it."""

import asyncio
import json

import pytest

from bonsai_image.tests.support.frontend import Page, frontend, needs_chromium, server_of_a_user
from bonsai_image.tests.support.shipped import FILES

pytestmark = needs_chromium

#: Puts nodes on an empty canvas, each connected with the one before it; ``[type, {widget: value}]`` of each.
BUILD = """((nodes) => {
    app.graph.clear();
    let before = null;
    for (const [type, values] of nodes) {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [before ? before.pos[0] + before.size[0] + 60 : 100, 200];
        for (const widget of node.widgets ?? []) widget.value = values[widget.name] ?? widget.value;
        before?.connect(0, node, 0);
        before = node;
    }
})"""
#: Opens the details of the error, which are one click away, and returns what the panel then shows.
DETAILS = "document.querySelector('[data-testid=\"error-overlay-see-errors\"]')"
PANEL = "document.querySelector('[data-testid=\"runtime-error-panel\"]')"
#: What a message over the graph says, which comes without a click and looks different in each frontend.
TOAST = """[...document.querySelectorAll('div')].find(
    each => !each.children.length && each.innerText?.startsWith('Run /'))?.innerText"""
#: The text on Bonsai Model Info.
TEXT = """app.graph.nodes.find(node => node.type === 'BonsaiModelInfo')
    .widgets?.find(each => each.name === 'text')?.value"""


@pytest.fixture(scope="module")
def server(comfyui, repository, binary_transformer, tmp_path_factory):
    with server_of_a_user(comfyui, repository, binary_transformer, tmp_path_factory.mktemp("messages")) as running:
        yield running


async def run(page: Page, *nodes: tuple[str, dict]) -> None:
    await page.evaluate(f"{BUILD}({json.dumps(nodes)})")
    await page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")


@pytest.mark.parametrize("modern", [False, True], ids=["canvas", "modern"])
def test_messages_are_read_where_they_are_looked_for(server, modern, tmp_path):
    async def scenario():
        async with frontend(server.url, tmp_path / "profile", modern) as page:
            await run(page, ("BonsaiModelLoader", {"model_name": FILES["diffusion_models"][1]}),
                      ("BonsaiModelInfo", {}))
            said = await page.until(TEXT)
            assert len(said.splitlines()) > 8 and "asked for: " in said and " MB packed" in said
            width, height = await page.evaluate("[...app.graph.nodes[1].size]")
            assert width > 400 and height > 50 + 20 * len(said.splitlines())
            fresh = "(node => { app.graph.add(node); return [...node.size]; })(LiteGraph.createNode('BonsaiModelInfo'))"
            assert await page.evaluate(fresh) == [width, height], "it has not grown over its neighbours"
            prompt = await page.evaluate("app.graphToPrompt().then(made => made.output)")
            assert list(prompt["2"]["inputs"]) == ["model"], "the text is no input: it would undo ComfyUI's cache"
            await asyncio.sleep(3)  # the frontend stores its workflow a moment later
            await page.send("Page.reload")
            await asyncio.sleep(2)
            await page.until("Boolean(window.app?.graph?.nodes?.length && app.extensionManager)", 120)
            assert await page.until(TEXT) == said

            await run(page, ("BonsaiCheckpointLoader", {"checkpoint": "bonsai-image-binary-4B-mlx-1bit"}),
                      ("BonsaiModelInfo", {}))
            assert (await page.until(TOAST)).startswith("Run /")
            await page.until(f"Boolean({DETAILS})")
            await page.evaluate(f"{DETAILS}.click()")
            # The traceback stands there until the frontend has put its report together.
            await page.until(f"{PANEL}?.innerText.slice(0, 200).includes('Run /')")
            panel = await page.evaluate(f"{PANEL}.innerText")
            assert "download --variant binary in a terminal" in panel[:600], panel[:600]

            await run(page, ("BonsaiModelLoader", {"model_name": FILES["diffusion_models"][1]}),
                      ("BonsaiModelInfo", {}))
            await page.until(f"!({TOAST})")

    asyncio.run(scenario())
