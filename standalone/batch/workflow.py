"""The settings of a ComfyUI workflow, saved (with its layout) or exported for the API, as a row's columns.

Understood are the nodes of this project's own example workflows. A node that is not in :data:`NODES` might change the
image, so a workflow with one is refused.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from ...loaders import ModelFileError
from ...loaders.errors import refusing
from ...loaders.files import locate
from ..references import open_image

#: The inputs of every known node that are widgets, in the order in which a saved workflow lists their values.
NODES: dict[str, tuple[str, ...]] = {
    "BonsaiCheckpointLoader": (), "BonsaiModelLoader": (), "BonsaiTextEncoderLoader": (), "VAELoader": (),
    "CLIPTextEncode": ("text",), "LoraLoaderModelOnly": ("lora_name", "strength_model"), "PrimitiveInt": ("value",),
    "RandomNoise": ("noise_seed",), "Flux2Scheduler": ("steps", "width", "height"),
    "EmptyFlux2LatentImage": ("width", "height", "batch_size"), "KSamplerSelect": ("sampler_name",),
    "BasicGuider": (), "SamplerCustomAdvanced": (), "VAEDecode": (), "SaveImage": (), "PreviewImage": (),
    "LoadImage": ("image",), "ImageScaleToTotalPixels": ("upscale_method", "megapixels", "resolution_steps"),
    "GetImageSize": (), "VAEEncode": (), "ReferenceLatent": ()}
_NOTES, _MUTED, _BYPASSED = {"MarkdownNote", "Note"}, 2, 4
#: Column of a row -> the node and its input that has the value.
_COLUMNS = {
    "prompt": ("CLIPTextEncode", "text"), "seed": ("RandomNoise", "noise_seed"), "steps": ("Flux2Scheduler", "steps"),
    "width": ("EmptyFlux2LatentImage", "width"), "height": ("EmptyFlux2LatentImage", "height"),
    "reference": ("LoadImage", "image"), "lora": ("LoraLoaderModelOnly", "lora_name"),
    "lora_strength": ("LoraLoaderModelOnly", "strength_model")}
#: Nodes that a workflow may lack.
_OPTIONAL = {"LoadImage", "LoraLoaderModelOnly"}

#: What ComfyUI's page replaces in a prompt before it sends it: choices, comments, escapes (``processDynamicPrompt``).
_DYNAMIC = re.compile(r"\{|//|/\*[\s\S]*?\*/|\\[{}|]|\\$")

Graph = dict[str, dict[str, Any]]


def settings(path: Path) -> dict[str, Any]:
    """Columns of a row: prompt, seed, width, height, steps, and reference and LoRA where there are any.

    File names are as the workflow has them. Raises ModelFileError for a workflow with another node, or with a node
    that is used in another way than in the example workflows.
    """
    graph = _graph(path)
    for number, node in graph.items():
        if node["class_type"] not in NODES:
            raise _refusal(path, "a workflow of this project's examples", f"a node {node['class_type']} "
                           f"(number {number})")
    found = _Reader(path, graph)
    if (sampler := found.value("KSamplerSelect", "sampler_name")) != "euler":
        raise _refusal(path, "the sampler euler", sampler)
    # The images of a batch share a seed: no single image has the noise of the second.
    if (size := found.value("EmptyFlux2LatentImage", "batch_size")) != 1:
        raise _refusal(path, "one image per seed", f"{size} in a batch")
    if found.nodes("LoadImage"):
        found.one("ReferenceLatent")
    return {column: found.value(kind, name) for column, (kind, name) in _COLUMNS.items()
            if found.nodes(kind) or kind not in _OPTIONAL}


def _refusal(path: Path, expected: str, found: str) -> ModelFileError:
    return ModelFileError(path, expected, found, "make its images in ComfyUI")


def _graph(path: Path) -> Graph:
    """Nodes by number in the API's form: class_type, and inputs that are values or ``[number, output]``."""
    with refusing(path, "a workflow of ComfyUI", "save it again in ComfyUI", OSError, ValueError, RecursionError):
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        try:
            return _from_saved(path, data) if "nodes" in data else {
                number: {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
                for number, node in data.items()}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"other JSON ({error})") from error


def _from_saved(path: Path, data: dict[str, Any]) -> Graph:
    links = {link[0]: [str(link[1]), link[2]] for link in data["links"]}
    graph = {}
    for node in data["nodes"]:
        mode = node.get("mode", 0)
        if node["type"] in _NOTES or mode in (_MUTED, _BYPASSED):
            continue
        # The frontend stores what happens to a seed after a run behind the seed, which is the last.
        inputs = dict(zip(NODES.get(node["type"], ()), node.get("widgets_values") or [], strict=False))
        if node["type"] == "CLIPTextEncode" and (found := _DYNAMIC.search(str(inputs.get("text")))):
            raise ModelFileError(path, "a prompt as it is sent", f"{found[0]!r} in node CLIPTextEncode (number "
                                 f"{node['id']}), which only ComfyUI's page expands", "export the workflow for the API")
        linked = {each["name"]: links[each["link"]] for each in node.get("inputs", ()) if each.get("link") is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return graph


class _Reader:
    """Reads values of nodes that a workflow has once."""

    def __init__(self, path: Path, graph: Graph):
        self._path, self._graph = path, graph

    def nodes(self, kind: str) -> list[dict[str, Any]]:
        return [node for node in self._graph.values() if node["class_type"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        nodes = self.nodes(kind)
        if len(nodes) != 1:
            raise _refusal(self._path, f"one node {kind}", str(len(nodes)))
        return nodes[0]

    def value(self, kind: str, name: str) -> Any:
        """A value of the one node of a kind, from the widget itself or the number that is linked to it."""
        value = self.one(kind)["inputs"].get(name)
        if not isinstance(value, list):
            if value is None:
                raise _refusal(self._path, f"a value for {name} of {kind}", "none")
            return re.sub(r"\s?\[(input|output|temp)\]$", "", str(value)) if name == "image" else value  # its folder
        source = self._graph.get(str(value[0]), {"class_type": "nothing"})
        if source["class_type"] == "PrimitiveInt":
            return source["inputs"]["value"]
        if source["class_type"] == "GetImageSize":
            return self._scaled()[value[1]]
        raise _refusal(self._path, f"a number for {name} of {kind}", f"a link from {source['class_type']}")

    def _scaled(self) -> tuple[int, int]:
        """Width and height of the reference as ImageScaleToTotalPixels makes them."""
        path = locate(self._path.parent, self.value("LoadImage", "image"))
        try:
            width, height = open_image(path).size
        except ModelFileError as error:
            raise ModelFileError(path, "the image that the workflow loads", error.found,
                                 "copy it beside the workflow") from error
        step = self.value("ImageScaleToTotalPixels", "resolution_steps")
        scale = math.sqrt(self.value("ImageScaleToTotalPixels", "megapixels") * 1024 * 1024 / (width * height))
        return tuple(max(1, round(side * scale / step)) * step for side in (width, height))
