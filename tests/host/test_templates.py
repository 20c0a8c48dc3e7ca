"""ComfyUI's own FLUX.2 Klein templates with nothing but the loaders exchanged: packed weights against dense ones.

The templates come with ComfyUI's own requirements. Their graphs are run here node by node, in miniature and in FP32.
"""

import asyncio
import importlib.resources
import json

import comfy.sd
import pytest
import torch

import nodes as host_nodes
from bonsai_image.loaders import load_text_encoder
from bonsai_image.nodes import models
from bonsai_image.ops.packed import is_packed
from bonsai_image.tests.support.reference import dense64, relative
from bonsai_image.tools import layout

#: Template -> which of its subgraphs, each a whole graph from the loaders to the image.
GRAPHS = {
    "image_flux2_klein_text_to_image": ["Text to Image (Flux.2 Klein 4B)", "Text to Image (Flux.2 Klein 4B Distilled)"],
    "image_flux2_klein_image_edit_4b_distilled": ["Image Edit (Flux.2 Klein 4B Distilled)"],
    "image_flux2_klein_image_edit_4b_base": ["Image Edit (Flux.2 Klein 4B)"],
}
LOADERS = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
#: Widgets that make a graph small, by node type and position.
SMALL = {("PrimitiveInt", 0): 64, ("ImageScaleToTotalPixels", 1): 0.01, ("EmptyFlux2LatentImage", 0): 64,
         ("EmptyFlux2LatentImage", 1): 64, ("Flux2Scheduler", 0): 2, ("RandomNoise", 0): 5}
#: The ids of what comes into a subgraph and what goes out.
IN, OUT = -10, -20


class Graph:
    """A subgraph of a template that can be run with given loaders and images."""

    def __init__(self, definition: dict, others: dict[str, dict], loaded: tuple, classes: dict[str, type]):
        self.definition, self.others, self.loaded, self.classes = definition, others, loaded, classes
        self.nodes = {node["id"]: node for node in definition["nodes"]}
        self.links = {link["id"]: link for link in definition["links"]}
        self.results: dict[int, tuple] = {}

    def run(self, inputs: list) -> list:
        """The outputs, with ``inputs`` (None: not connected) for what comes in."""
        self.inputs = inputs
        ends = sorted((link["target_slot"], link["id"]) for link in self.links.values() if link["target_id"] == OUT)
        return [self.value(link) for _, link in ends]

    def value(self, number: int):
        link = self.links[number]
        if link["origin_id"] == IN:
            return self.inputs[link["origin_slot"]]
        if link["origin_id"] not in self.results:
            self.results[link["origin_id"]] = self.result(self.nodes[link["origin_id"]])
        return self.results[link["origin_id"]][link["origin_slot"]]

    def result(self, node: dict) -> tuple:
        kind = node["type"]
        if kind in LOADERS:
            return (self.loaded[LOADERS[kind]],)
        values = {entry["name"]: self.value(entry["link"]) for entry in node["inputs"] if entry.get("link") is not None}
        if kind in self.others:
            graph = Graph(self.others[kind], self.others, self.loaded, self.classes)
            return tuple(graph.run([values.get(entry["name"]) for entry in self.others[kind]["inputs"]]))
        cls = self.classes[kind]
        widgets = [name for name, _, widget in layout.sockets(cls)[0] if widget]
        given = [SMALL.get((kind, i), value) for i, value in enumerate(node["widgets_values"])]
        arguments = {**dict(zip(widgets, given, strict=False)), **{k: v for k, v in values.items() if v is not None}}
        node = cls.PREPARE_CLASS_CLONE(None) if hasattr(cls, "PREPARE_CLASS_CLONE") else cls()
        answer = getattr(node, cls.FUNCTION)(**arguments)
        return tuple(getattr(answer, "result", answer))


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    asyncio.run(host_nodes.init_builtin_extra_nodes())
    return host_nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def loaded(pair, repository):
    """MODEL, CLIP and VAE: packed, and dense in ComfyUI's own layers."""
    encoder = load_text_encoder(repository / "text_encoder-mlx-4bit")
    dense = {name: dense64(tensor).float() if is_packed(tensor) else tensor.float()
             for name, tensor in encoder.tensors.items()}
    clip = comfy.sd.load_text_encoder_state_dicts(
        [dense], clip_type=comfy.sd.CLIPType.FLUX2, model_options={
            "qwen3_4b_model_config": models.text_dimensions(encoder.config)})
    vae = models.load_vae_model(str(repository / "vae"))
    return (pair[0], models.load_clip(str(repository / "text_encoder-mlx-4bit"), "fp32"), vae), (pair[1], clip, vae)


def template(name: str) -> dict[str, dict]:
    """The subgraphs of a template by id."""
    package = importlib.resources.files("comfyui_workflow_templates_json")
    text = (package / "templates" / f"{name}.json").read_text(encoding="utf-8")
    return {graph["id"]: graph for graph in json.loads(text)["definitions"]["subgraphs"]}


@pytest.mark.parametrize(("name", "title"), [(name, title) for name, titles in GRAPHS.items() for title in titles])
def test_a_template_with_the_loaders_exchanged(loaded, classes, name, title):
    graphs = template(name)
    definition = next(graph for graph in graphs.values() if graph["name"] == title)
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.rand(1, 64, 64, 3, generator=generator) if entry["type"] == "IMAGE" else
              "a bonsai tree" if entry["name"] == "text" else None for entry in definition["inputs"]]
    packed, dense = (Graph(definition, graphs, each, classes).run(inputs)[0] for each in loaded)
    assert dense.shape[-1] == 3 and dense.std() > 1e-3
    assert relative(packed, dense) < 1e-3
