"""What the lists of the loaders show, and what reaches a loader from ComfyUI's command line."""

import os
import shutil
from pathlib import Path

import folder_paths
import pytest
from comfy.cli_args import args as host_args

from bonsai_image import published
from bonsai_image.loaders import find_repository
from bonsai_image.nodes import folders, models
from bonsai_image.nodes.definitions import BonsaiCheckpointLoader, BonsaiModelLoader, BonsaiTextEncoderLoader

TRANSFORMER = "transformer-packed-mflux"
PUBLISHED = ["bonsai-image-ternary-4B-mlx-2bit", "bonsai-image-binary-4B-mlx-1bit"]


@pytest.fixture
def roots(tmp_path, monkeypatch) -> Path:
    for kind in ("checkpoints", "diffusers", "diffusion_models", "text_encoders"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_repositories_in_every_place(roots, repository):
    root = roots / "diffusers"
    for name in ("plain", "prism-ml/below", "twice/twice", "models--prism-ml--x/snapshots/abc", "x.partial"):
        shutil.copytree(repository, root / name)
    (root / "plain" / "._vae").touch()
    shutil.copytree(repository, root / "nested")
    (root / "nested" / TRANSFORMER).rename(root / "moved")
    (root / "nested" / TRANSFORMER).mkdir()
    (root / "moved").rename(root / "nested" / TRANSFORMER / TRANSFORMER)
    (root / "empty").mkdir()
    shutil.copytree(root / "plain", root / "another-model")
    (root / "another-model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    choices = folders.checkpoint_choices()
    assert choices == ["models--prism-ml--x", "nested", "plain", "prism-ml/below", "twice/twice"]
    for choice in choices:
        assert find_repository(folders.resolve("diffusers", choice)).require("text_encoder", "vae")


def test_folders_are_walked_once_until_they_change(roots, repository, monkeypatch):
    """The browser asks for every list at every start and refresh, and a share of models is slow to walk."""
    looks = []
    for name in ("scandir", "listdir", "walk"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, original=original, **kw: looks.append(1) or original(*args, **kw))

    def request() -> list[list[str]]:
        return [node.GET_SCHEMA().inputs[0].options for node in (BonsaiCheckpointLoader, BonsaiModelLoader)]

    (roots / "diffusion_models" / "a.gguf").touch()
    assert request() == [PUBLISHED, ["a.gguf"]] and looks
    looks.clear()
    assert request() == [PUBLISHED, ["a.gguf"]] and not looks
    shutil.copytree(repository, roots / "diffusers" / "new")
    (roots / "diffusion_models" / "below").mkdir()
    (roots / "diffusion_models" / "below" / "b.gguf").touch()
    assert request() == [["new"], ["a.gguf", "below", "below/b.gguf"]]
    shutil.rmtree(roots / "diffusers" / "new" / TRANSFORMER)
    (roots / "diffusers" / "new").rename(roots / "diffusers" / "new.partial")
    assert request()[0] == PUBLISHED


@pytest.mark.parametrize(("node", "names"), [(BonsaiCheckpointLoader, PUBLISHED), (BonsaiModelLoader, PUBLISHED),
                                             (BonsaiTextEncoderLoader, ["bonsai-image-qwen3-4B-mlx-4bit"])])
def test_an_empty_list_offers_what_is_published(roots, node, names):
    """With nothing to choose, Run would only say that an input is missing. A file that has an ending is offered for
    download by the frontend itself, unless it is in the list."""
    (combo, *_) = node.GET_SCHEMA().inputs
    assert combo.options == names
    for name in names:
        with pytest.raises(ValueError, match=r"\A(Run .* download |Download https://huggingface.co/prism-ml/.* as "
                                             rf"{name}\.safetensors into {roots}/)"):
            node.execute(name)


def test_no_attribute_files_and_no_unfinished_downloads(roots):
    for name in ("a.safetensors", "._a.safetensors", "x.partial/b.safetensors", ".cache/c.safetensors"):
        path = roots / "diffusion_models" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert folders.file_choices("diffusion_models") == ["a.safetensors"]


@pytest.mark.parametrize("disabled", [False, True])
def test_disable_mmap_reaches_every_loader(repository, monkeypatch, disabled):
    monkeypatch.setattr(host_args, "disable_mmap", disabled)
    seen = []

    def note(path, *_, mmap, **__):
        seen.append(mmap)
        raise InterruptedError

    for name in ("load_transformer", "load_text_encoder", "load_vae"):
        monkeypatch.setattr(models, name, note)
    for load in (models.load_model, models.load_clip, models.load_vae_model):
        with pytest.raises(InterruptedError):
            load(str(repository))
    assert seen == [not disabled] * 3


def test_info_names_the_published_file(repository, monkeypatch):
    model = models.load_model(str(repository / TRANSFORMER))
    file = f"{TRANSFORMER}/diffusion_pytorch_model.safetensors"
    assert "published" not in models.describe(model)
    listed = published.File(file, (repository / file).stat().st_size, "0" * 64)
    monkeypatch.setattr(published, "RELEASES", {("ternary", "mlx"): published.Release(
        "prism-ml/bonsai-x", "0123456789abcdef", (listed,))})
    told = "published: as long as the published file of prism-ml/bonsai-x, revision 0123456789"
    assert told in models.describe(model)
