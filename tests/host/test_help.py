"""Help pages and translations: complete against the node schemas, and served where the frontend asks for them."""

import asyncio
import json

import aiohttp
import pytest

from bonsai_image.tests.support.comfyui_server import ROOT, Server
from bonsai_image.tests.support.shipped import SCHEMAS

LANGUAGES = ("en", "zh", "ja", "ko", "fr", "es")


def definitions(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def gaps(translated: dict) -> list[str]:
    """What is missing in the translations of one language, or is there without a node that has it."""
    found = [f"{node}: no such node" for node in translated.keys() - SCHEMAS.keys()]
    for node, schema in SCHEMAS.items():
        entry = translated.get(node, {})
        found += [f"{node}: no {key}" for key in ("display_name", "description") if not entry.get(key)]
        inputs, names = entry.get("inputs", {}), {item.id for item in schema.inputs}
        found += [f"{node}.{name}: input on one side only" for name in inputs.keys() ^ names]
        found += [f"{node}.{name}: no {key}" for name, words in inputs.items() for key in ("name", "tooltip")
                  if not words.get(key)]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_complete(language):
    assert not gaps(definitions(language))


def test_english_is_what_the_nodes_say():
    for node, words in definitions("en").items():
        schema = SCHEMAS[node]
        assert (words["display_name"], words["description"]) == (schema.display_name, schema.description)
        assert {item.id: item.tooltip for item in schema.inputs} == {
            name: entry["tooltip"] for name, entry in words["inputs"].items()}


@pytest.mark.parametrize("change", [
    lambda d: d.pop("BonsaiModelInfo"),
    lambda d: d["BonsaiCheckpointLoader"]["inputs"].pop("checkpoint"),
    lambda d: d["BonsaiCheckpointLoader"]["inputs"].update(old={"name": "a", "tooltip": "b"}),
    lambda d: d["BonsaiSaveModel"].update(description=""),
])
def test_each_kind_of_gap_is_found(change):
    translated = definitions("fr")
    change(translated)
    assert gaps(translated)


@pytest.mark.parametrize("node", SCHEMAS)
def test_help_names_every_input_and_shows_the_node(node):
    text = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {SCHEMAS[node].display_name}\n")
    assert all(f"- **{item.id}**:" in text for item in SCHEMAS[node].inputs)
    # Beside the page: that is what the frontend takes a relative address from.
    assert f"]({node}.jpg)\n" in text
    assert (ROOT / "web" / "docs" / f"{node}.jpg").stat().st_size < 40_000


def test_server_serves_help_and_translations_under_any_folder_name(comfyui, repository, tmp_path):
    server = Server(comfyui, tmp_path / "base", repository, folder="another-name")

    async def scenario():
        await server.wait()
        info = await server.get("/object_info/BonsaiCheckpointLoader")
        folder = info["BonsaiCheckpointLoader"]["python_module"].removeprefix("custom_nodes.")
        async with aiohttp.ClientSession() as session:
            for node in SCHEMAS:
                async with session.get(f"{server.url}/extensions/{folder}/docs/{node}.md") as reply:
                    assert reply.status == 200 and (await reply.text()).startswith("# ")
                async with session.get(f"{server.url}/extensions/{folder}/docs/{node}.jpg") as reply:
                    assert reply.status == 200 and reply.content_type == "image/jpeg"
        served = await server.get("/i18n")
        assert all(served[language]["nodeDefs"].items() >= definitions(language).items() for language in LANGUAGES)

    try:
        asyncio.run(scenario())
    finally:
        server.process.terminate()
        server.process.wait(30)
