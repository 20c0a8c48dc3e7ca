"""A GGUF file in ComfyUI: listed where it can be loaded, and the same MODEL as from any other format."""

from pathlib import Path

import folder_paths
import torch

from bonsai_image.loaders import load_transformer, save_transformer
from bonsai_image.nodes import definitions as nodes
from bonsai_image.published import SINGLE_FILES
from bonsai_image.tests.support.sampling import host_forward


def options(node) -> list[str]:
    return node.define_schema().inputs[0].options


def test_listed_and_loaded(tmp_path, monkeypatch, binary_transformer, inputs):
    for kind in ("diffusion_models", "text_encoders"):
        suffixes = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], suffixes))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert options(nodes.BonsaiModelLoader) == [Path(n).stem for n in SINGLE_FILES["diffusion_models"]]

    source = load_transformer(binary_transformer)
    save_transformer(source, tmp_path / "community" / "model.gguf", "gguf")
    save_transformer(source, tmp_path / "model.safetensors", "comfy")
    assert options(nodes.BonsaiModelLoader) == ["community", "community/model.gguf", "model.safetensors"]
    assert "community/model.gguf" not in options(nodes.BonsaiTextEncoderLoader)
    assert "community/model.gguf" not in folder_paths.get_filename_list("diffusion_models"), "ComfyUI cannot load it"

    setting = {"compute_dtype": "fp32", "backend": "torch"}
    outputs = [host_forward(nodes.BonsaiModelLoader.execute(name, **setting).args[0], inputs)
               for name in ("community/model.gguf", "community", "model.safetensors")]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
