"""Settings handed over from a ComfyUI workflow, saved or exported for the API."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bonsai_image.loaders import ModelFileError
from bonsai_image.standalone.batch import manifest
from bonsai_image.standalone.batch.workflow import settings
from bonsai_image.standalone.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "example_workflows"
PROMPT = "A tiny bonsai tree in a blue ceramic pot on a wooden windowsill, soft morning light, photograph"
EXPORTED = {
    "1": {"class_type": "BonsaiCheckpointLoader", "inputs": {"checkpoint": "x"}},
    "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "l.safetensors",
                                                          "strength_model": 0.6}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a bonsai"}},
    "4": {"class_type": "PrimitiveInt", "inputs": {"value": 512}},
    "5": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
    "6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "7": {"class_type": "Flux2Scheduler", "inputs": {"steps": 4, "width": ["4", 0], "height": 256}},
    "8": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": ["4", 0], "height": 256, "batch_size": 1}},
}


def saved(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def write(path: Path, graph: dict) -> Path:
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


@pytest.mark.parametrize("name, side", [("1 Text to image", 1024), ("2 Binary, three files", 768),
                                        ("3 LoRA", 1024)])
def test_saved_examples_are_understood(name, side):
    """The LoRA nodes of the example are switched off."""
    assert settings(EXAMPLES / f"{name}.json") == {
        "prompt": PROMPT, "seed": 20260331, "steps": 4, "width": side, "height": side}


def test_a_lora_that_is_switched_on_is_handed_over(tmp_path):
    graph = saved("3 LoRA")
    next(node for node in graph["nodes"] if node["type"] == "LoraLoaderModelOnly")["mode"] = 0
    found = settings(write(tmp_path / "a.json", graph))
    assert (found["lora"], found["lora_strength"]) == ("flux2_klein_4b_lora.safetensors", 1.0)


def test_a_reference_has_the_size_that_comfyui_gives_it(tmp_path):
    Image.new("RGB", (1500, 1000)).save(tmp_path / "example.png")
    found = settings(write(tmp_path / "a.json", saved("8 Reference edit")))
    assert (found["reference"], found["width"], found["height"]) == ("example.png", 1248, 832)
    with pytest.raises(ModelFileError, match="copy it beside the workflow"):
        settings(EXAMPLES / "8 Reference edit.json")


@pytest.mark.parametrize("mark", [" [input]", " [output]", "[temp]"])
def test_the_mark_of_comfyui_s_folder_is_no_part_of_a_name(mark, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    graph = saved("8 Reference edit")
    next(node for node in graph["nodes"] if node["type"] == "LoadImage")["widgets_values"][0] = f"a.png{mark}"
    assert settings(write(tmp_path / "a.json", graph))["reference"] == "a.png"


def test_a_workflow_of_an_older_page_or_editor_is_understood(tmp_path):
    """Nodes without an input had no list of them; Windows' editors write a byte order mark."""
    graph = saved("1 Text to image")
    for node in graph["nodes"]:
        if not node["inputs"]:
            del node["inputs"]
    path = write(tmp_path / "a.json", graph)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert settings(path) == settings(EXAMPLES / "1 Text to image.json")


def test_an_exported_workflow_is_understood(tmp_path):
    assert settings(write(tmp_path / "a.json", EXPORTED)) == {
        "prompt": "a bonsai", "seed": 7, "steps": 4, "width": 512, "height": 256, "lora": "l.safetensors",
        "lora_strength": 0.6}


@pytest.mark.parametrize("change, words", [
    ({"9": {"class_type": "ControlNetApply", "inputs": {}}}, r"a node ControlNetApply \(number 9\)"),
    ({"9": EXPORTED["3"]}, "one node CLIPTextEncode, found 2"), ({"9": EXPORTED["2"]}, "one node LoraLoaderModelOnly"),
    ({"6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}}, "the sampler euler"),
    ({"3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["5", 0]}}}, "a link from RandomNoise"),
    ({"5": {"class_type": "RandomNoise", "inputs": {}}}, "a value for noise_seed"), ({"5": []}, "other JSON"),
    ({"9": {"class_type": "LoadImage", "inputs": {"image": 5}}}, "one node ReferenceLatent"),
    ({"8": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}}},
     "one image")], ids=str)
def test_another_workflow_is_refused_by_what_is_not_known(change, words, tmp_path):
    with pytest.raises(ModelFileError, match=words):
        settings(write(tmp_path / "a.json", EXPORTED | change))


@pytest.mark.parametrize("name, words", [("5 Image to image", "a node SplitSigmasDenoise"),
                                         ("6 Batch variations", "'{' in node CLIPTextEncode")])
def test_examples_that_batch_cannot_make_are_refused(name, words):
    with pytest.raises(ModelFileError, match=words):
        settings(EXAMPLES / f"{name}.json")


@pytest.mark.parametrize("text, mark", [
    ("a {red|blue} pot", "{"), ("a {red} pot", "{"), ("a pot // not this", "//"), ("a /* b\nc */ d", "/* b\nc */"),
    (r"a \{ pot", r"\{"), (r"a \| pot", r"\|"), ("a pot\\", "\\")])
def test_a_prompt_that_only_the_page_expands_is_refused_by_name(text, mark, tmp_path):
    """In a saved workflow; what is exported for the API was expanded before."""
    graph = saved("1 Text to image")
    node = next(node for node in graph["nodes"] if node["type"] == "CLIPTextEncode")
    node["widgets_values"] = [text]
    with pytest.raises(ModelFileError) as caught:
        settings(write(tmp_path / "a.json", graph))
    assert f"{mark!r} in node CLIPTextEncode (number {node['id']})" in str(caught.value)
    exported = EXPORTED | {"3": {"class_type": "CLIPTextEncode", "inputs": {"text": text}}}
    assert settings(write(tmp_path / "a.json", exported))["prompt"] == text


@pytest.mark.parametrize("text", ["a (red:1.2) } | pot / *", r"a \(round\) __pot__ \n"])
def test_other_marks_reach_the_prompt(text, tmp_path):
    graph = saved("1 Text to image")
    next(node for node in graph["nodes"] if node["type"] == "CLIPTextEncode")["widgets_values"] = [text]
    assert settings(write(tmp_path / "a.json", graph))["prompt"] == text


def test_set_changes_what_the_workflow_says(tmp_path):
    words = ["--set", "prompt=a red star", "--set", "width=64", "--set", "height=64", "--set", "steps=1",
             "--workflow", EXAMPLES / "1 Text to image.json"]
    assert main([str(word) for word in ("batch", *words, "--checkpoint", ROOT / "miniature" / "ternary", "--out",
                                        tmp_path, "--device", "cpu", "--dtype", "fp32", "--shards", "1/1")]) == 0
    (row,) = manifest.read(tmp_path)
    assert (row["prompt"], row["seed"], row["width"]) == ("a red star", 20260331, 64)
