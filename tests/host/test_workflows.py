"""Every example workflow and the blueprint say what the node schemas say: nodes, inputs, widget values, outputs, links.

With UPDATE_WORKFLOWS=1 they are written anew by tools/workflows.py; otherwise nothing in the repository changes.
"""

import asyncio
import copy
import importlib.resources
import json
import os
import re
import shutil
from pathlib import Path

import folder_paths
import pytest

import nodes as host_nodes
from bonsai_image import __version__
from bonsai_image.nodes.definitions import BonsaiExtension
from bonsai_image.tests.support.comfyui_server import ROOT
from bonsai_image.tests.support.shipped import BLUEPRINT, DOWNLOADED, FILES, TRAINING, WORKFLOWS
from bonsai_image.tools import layout
from bonsai_image.tools import workflows as tool

#: Nodes that exist in the frontend only, and have no inputs, outputs or schema.
NOTES = {"MarkdownNote", "Note"}
CONTROLS = ("fixed", "increment", "decrement", "randomize")


@pytest.fixture(scope="module")
def schemas(tmp_path_factory, comfyui) -> dict[str, type]:
    """Node classes by id, on a machine where all that the notes name has been downloaded."""
    asyncio.run(host_nodes.init_builtin_extra_nodes())
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers" / DOWNLOADED / "transformer").mkdir(parents=True)
    (root / "diffusers" / DOWNLOADED / "transformer" / "weights.safetensors").touch()
    for kind, names in FILES.items():
        (root / kind).mkdir()
        for name in names:
            (root / kind / name).touch()
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("diffusers", *FILES):
            extensions = folder_paths.folder_names_and_paths[kind][1]
            patch.setitem(folder_paths.folder_names_and_paths, kind, ([str(root / kind)], extensions))
        patch.setattr(folder_paths, "filename_list_cache", {})
        (root / "input" / TRAINING).mkdir(parents=True)
        shutil.copy(comfyui / "input" / "example.png", root / "input")
        patch.setattr(folder_paths, "input_directory", str(root / "input"))
        ours = asyncio.run(BonsaiExtension().get_node_list())
        yield host_nodes.NODE_CLASS_MAPPINGS | {node.GET_SCHEMA().node_id: node for node in ours}


def choices(spec: tuple) -> list | None:
    """The options of a combo, in either of the host's two spellings, or None for another input."""
    if isinstance(spec[0], list):
        return spec[0]
    return spec[1]["options"] if spec[0] == "COMBO" else None


def is_widget(spec: tuple) -> bool:
    return choices(spec) is not None or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")


def fits(value, spec: tuple) -> bool:
    if choices(spec) is not None:
        return value in choices(spec)
    if spec[0] in ("INT", "FLOAT"):
        kinds = int if spec[0] == "INT" else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and spec[1].get("min", value) <= value <= spec[1].get("max", value)
    return isinstance(value, str if spec[0] == "STRING" else bool)


def node_problems(node: dict, schema: type) -> list[str]:
    """What is wrong with one node by itself."""
    found = []
    types = schema.INPUT_TYPES()
    required, specs = types["required"], types["required"] | types.get("optional", {})
    sockets = {entry["name"]: entry for entry in node["inputs"]}
    for name, entry in sockets.items():
        expected = None if name not in specs else "COMBO" if choices(specs[name]) is not None else specs[name][0]
        if entry["type"] != expected:
            found.append(f"input {name} is a {entry['type']}, the schema has {expected}")
    for name, spec in required.items():
        if not is_widget(spec) and sockets.get(name, {}).get("link") is None:
            found.append(f"input {name} is not connected")
    if [output["type"] for output in node["outputs"]] != list(schema.RETURN_TYPES):
        found.append(f"outputs are not {list(schema.RETURN_TYPES)}")
    widgets = []
    for name, spec in specs.items():
        if is_widget(spec):
            widgets.append((name, spec))
            if len(spec) > 1 and spec[1].get("control_after_generate", name == "seed"):
                widgets.append((f"control of {name}", ("COMBO", {"options": CONTROLS})))
    if len(node["widgets_values"]) != len(widgets):
        found.append(f"{len(node['widgets_values'])} widget values, the schema has {len(widgets)}")
    pairs = zip(node["widgets_values"], widgets, strict=False)
    found += [f"{name} cannot be {value!r}" for value, (name, spec) in pairs if not fits(value, spec)]
    return found


def link_problems(workflow: dict) -> list[str]:
    """What is wrong between the nodes: each link is written down three times, and all three must agree."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    links = [tuple(link) for link in workflow["links"]]
    starts = [(link, node["id"], slot, output["type"]) for node in by_id.values()
              for slot, output in enumerate(node["outputs"]) for link in output["links"]]
    ends = [(entry["link"], node["id"], slot, entry["type"]) for node in by_id.values()
            for slot, entry in enumerate(node["inputs"]) if entry["link"] is not None]
    found = []
    if sorted(starts) != sorted((link, source, slot, kind) for link, source, slot, _, _, kind in links):
        found.append("links and outputs disagree")
    if sorted(ends) != sorted((link, target, slot, kind) for link, _, _, target, slot, kind in links):
        found.append("links and inputs disagree")
    if len(by_id) != len(workflow["nodes"]) or len({link[0] for link in links}) != len(links):
        found.append("an id is used twice")
    if workflow["last_node_id"] < max(by_id) or workflow["last_link_id"] < max(link[0] for link in links):
        found.append("the next new node or link would take an id that is in use")
    return found


def problems(workflow: dict, schemas: dict[str, type]) -> list[str]:
    found = link_problems(workflow)
    for node in workflow["nodes"]:
        if node["type"] in schemas:
            found += [f"{node['type']}: {problem}" for problem in node_problems(node, schemas[node["type"]])]
        elif node["type"] not in NOTES:
            found.append(f"{node['type']}: no such node")
    return found


def write(path: Path, content: dict) -> None:
    if os.environ.get("UPDATE_WORKFLOWS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_the_tools(path, schemas):
    made = layout.workflow(path.stem, tool.WORKFLOWS[path.stem](), schemas, __version__)
    write(path, made)
    assert json.loads(path.read_text(encoding="utf-8")) == made


def test_every_file_is_a_workflow_of_the_tool():
    assert sorted((ROOT / "example_workflows").glob("*.json")) == sorted(WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_agrees_with_the_schemas(path, schemas):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert not problems(workflow, schemas)
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 300_000, "the thumbnail is loaded with the list of templates"


#: Pixels of the smallest canvas; part of it that *Fit view* fills with the groups and a margin; scale below which the
#: frontend draws no text.
CANVAS, FILLED, MARGIN, READABLE = (1366, 768), 0.75, 20, 8 / 14


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_is_readable_in_a_small_window(path):
    frames = [group["bounding"] for group in json.loads(path.read_text(encoding="utf-8"))["groups"]]
    sides = (MARGIN + max(frame[axis] + frame[axis + 2] for frame in frames) - min(frame[axis] for frame in frames)
             for axis in (0, 1))
    assert FILLED * min(pixels / side for pixels, side in zip(CANVAS, sides, strict=True)) > READABLE


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_notes_say_which_file_goes_where(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES)
    checkpoints = [node for node in workflow["nodes"] if node["type"] == "BonsaiCheckpointLoader"]
    files = [entry for node in workflow["nodes"] for entry in node["properties"].get("models", [])]
    assert checkpoints or len(files) == 3
    assert "`" not in notes, "Nodes 2.0 scrolls code sideways, or writes it blue on blue"
    for loader in checkpoints:
        assert f"huggingface.co/prism-ml/{loader['widgets_values'][0]})" in notes
        assert f"\n> models/diffusers/{loader['widgets_values'][0]}\n" in notes
        assert "download --variant" in notes and "no button for a folder" in notes
    for entry in files:
        assert f"({entry['url']}) as\n\n> models/{entry['directory']}/{entry['name']}\n" in notes


#: Of the loaders of single files: their folder, and the input that names the file.
SINGLE = {"BonsaiModelLoader": ("diffusion_models", "model_name"), "VAELoader": ("vae", "vae_name"),
          "BonsaiTextEncoderLoader": ("text_encoders", "text_encoder_name"),
          "CLIPLoader": ("text_encoders", "clip_name")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_the_frontend_offers_for_download_is_what_the_node_loads(path, schemas, tmp_path, monkeypatch):
    """It offers the entry whose name is the value of a list that lacks it, and stores it under that name."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] not in SINGLE:
            assert "models" not in node["properties"], "never offered"
            continue
        folder, widget = SINGLE[node["type"]]
        (entry,) = node["properties"]["models"]
        assert (entry["name"], entry["directory"]) == (node["widgets_values"][0], folder)
        assert entry["url"] == tool.FILES[folder][entry["name"]]

        root = tmp_path / str(node["id"])
        root.mkdir()
        extensions = folder_paths.folder_names_and_paths[folder][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(root)], extensions))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        schema = schemas[node["type"]]
        assert entry["name"] not in choices(schema.INPUT_TYPES()["required"][widget])
        if node["type"].startswith("Bonsai"):
            said = re.escape(f"Download {entry['url']} as {entry['name']} into {root}, and press R")
            with pytest.raises(ValueError, match=rf"\A{said}"):
                schema.execute(entry["name"])
        (root / entry["name"]).touch()
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        assert entry["name"] in choices(schema.INPUT_TYPES()["required"][widget])
        assert folder_paths.get_full_path(folder, entry["name"]) == str(root / entry["name"])


def test_the_files_of_klein_are_those_of_comfyui_s_template():
    package = importlib.resources.files("comfyui_workflow_templates_json")
    text = (package / "templates" / "image_flux2_klein_text_to_image.json").read_text(encoding="utf-8")
    for folder, files in tool.KLEIN_FILES.items():
        for file, url in files.items():
            entry = {"name": file, "url": url, "directory": folder}
            assert all(f'"{key}": {json.dumps(value)}' in text for key, value in entry.items())


def node_of(workflow: dict, kind: str) -> dict:
    return next(node for node in workflow["nodes"] if node["type"] == kind)


MUTATIONS = {
    "unknown node": (lambda w: node_of(w, "BonsaiCheckpointLoader").update(type="BonsaiPackLoder"), "no such node"),
    "too few widgets": (lambda w: node_of(w, "RandomNoise")["widgets_values"].pop(), "widget values"),
    "value out of range": (lambda w: node_of(w, "Flux2Scheduler")["widgets_values"].__setitem__(0, 0), "cannot be 0"),
    "value of another type": (lambda w: node_of(w, "PrimitiveInt")["widgets_values"].__setitem__(0, "1024"),
                              "cannot be '1024'"),
    "choice that is gone": (lambda w: node_of(w, "KSamplerSelect")["widgets_values"].__setitem__(0, "eular"),
                            "cannot be 'eular'"),
    "checkpoint under another name": (
        lambda w: node_of(w, "BonsaiCheckpointLoader")["widgets_values"].__setitem__(0, "bonsai"),
        "cannot be 'bonsai'"),
    "renamed input": (lambda w: node_of(w, "BasicGuider")["inputs"][0].update(name="modell"), "input modell"),
    "open input": (lambda w: node_of(w, "VAEDecode")["inputs"].pop(), "vae is not connected"),
    "missing output": (lambda w: node_of(w, "BonsaiCheckpointLoader")["outputs"].pop(), "outputs are not"),
    "wrong link type": (lambda w: w["links"][0].__setitem__(5, "VAE"), "links and"),
    "link to another slot": (lambda w: w["links"][0].__setitem__(2, 0), "links and outputs"),
    "link to a node that is gone": (lambda w: w["links"][0].__setitem__(3, 99), "links and inputs"),
    "id used twice": (lambda w: w["nodes"].append(copy.deepcopy(w["nodes"][1])), "used twice"),
    "old last id": (lambda w: w.update(last_node_id=1), "in use"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_kind_of_mistake_is_found(mutation, schemas):
    workflow = json.loads((ROOT / "example_workflows" / "1 Text to image.json").read_text(encoding="utf-8"))
    change, message = MUTATIONS[mutation]
    change(workflow)
    assert any(message in problem for problem in problems(workflow, schemas))


def inside(blueprint: dict) -> dict:
    """The subgraph as a workflow, what comes in and goes out as nodes."""
    (graph,) = blueprint["definitions"]["subgraphs"]
    order = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    sources = [{"type": entry["type"], "links": entry["linkIds"]} for entry in graph["inputs"]]
    sinks = [{"name": entry["name"], "type": entry["type"], "link": entry["linkIds"][0]} for entry in graph["outputs"]]
    return {"nodes": [*graph["nodes"],
                      {"id": graph["inputNode"]["id"], "type": "Note", "inputs": [], "outputs": sources},
                      {"id": graph["outputNode"]["id"], "type": "Note", "inputs": sinks, "outputs": []}],
            "links": [[link[key] for key in order] for link in graph["links"]],
            "last_node_id": graph["state"]["lastNodeId"], "last_link_id": graph["state"]["lastLinkId"]}


def test_blueprint_is_the_tools(schemas):
    made = layout.blueprint(tool.BLUEPRINT, tool.BLUEPRINT_DESCRIPTION, tool.blueprint_columns(), tool.BLUEPRINT_INPUTS,
                            tool.BLUEPRINT_OUTPUT, schemas, __version__)
    write(BLUEPRINT, made)
    assert json.loads(BLUEPRINT.read_text(encoding="utf-8")) == made
    assert list((ROOT / "subgraphs").iterdir()) == [BLUEPRINT]


def test_blueprint_agrees_with_the_schemas(schemas):
    blueprint = json.loads(BLUEPRINT.read_text(encoding="utf-8"))
    graph = inside(blueprint)
    assert not problems(graph, schemas)
    graph["nodes"][0]["inputs"][0]["link"] = None
    assert problems(graph, schemas)
    (node,) = blueprint["nodes"]
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == BLUEPRINT.stem
    assert [entry["name"] for entry in node["inputs"]] == ["prompt", "width", "height", "seed", "checkpoint"]
    assert [(entry["name"], entry["type"]) for entry in node["outputs"]] == [("IMAGE", "IMAGE")]
