"""What ComfyUI's own nodes save of our MODEL, CLIP and VAE loads again, bit for bit and packed."""

from functools import partial
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import CheckpointSave, CLIPSave, ModelSave, VAESave
from safetensors.torch import save_file

from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer, load_vae
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.nodes import definitions, folders, models
from bonsai_image.ops.packed import equal, is_packed

#: Of a text encoder, a CLIP has what is read.
LOADERS = {"transformer": load_transformer, "text_encoder": partial(load_text_encoder, whole=False), "vae": load_vae}


@pytest.fixture(scope="module")
def saved(repository, tmp_path_factory) -> Path:
    """Files by the names of the nodes that saved them."""
    folder = tmp_path_factory.mktemp("saved")
    model = models.load_model(str(repository / "transformer-packed-mflux"))
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"))
    vae = models.load_vae_model(str(repository / "vae"))
    for node, parts in ((CheckpointSave, (model, clip, vae)), (ModelSave, (model,)), (CLIPSave, (clip,)),
                        (VAESave, (vae,))):
        saving = node()
        saving.output_dir = str(folder)
        saving.save(*parts, node.__name__)
        next(folder.glob(f"{node.__name__}_*")).rename(folder / f"{node.__name__}.safetensors")
    comfy.model_management.unload_all_models()
    return folder


@pytest.mark.parametrize(("node", "part"), [
    (CheckpointSave, "transformer"), (CheckpointSave, "text_encoder"), (CheckpointSave, "vae"),
    (ModelSave, "transformer"), (CLIPSave, "text_encoder"), (VAESave, "vae")])
def test_what_comfyui_saves_loads_again(node, part, saved, repository):
    """ComfyUI keeps norms and the VAE in the dtype that it computes in: equal in value."""
    expected = LOADERS[part](repository).tensors
    if part == "transformer":
        expected = to_comfyui(expected)
    found = LOADERS[part](saved / f"{node.__name__}.safetensors").tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert equal(tensor, other) if is_packed(tensor) else torch.equal(tensor.float(), other.float()), name


def test_the_checkpoint_node_lists_and_loads_it(saved, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.safetensors").symlink_to(saved / "CheckpointSave.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, tmp_path / "sd.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"1")
    for kind, folder in (("checkpoints", tmp_path), ("diffusers", tmp_path / "none")):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (name,) = folders.checkpoint_choices()
    assert Path(name).as_posix() == "sub/one.safetensors"
    loaded = definitions.BonsaiCheckpointLoader.execute(name).args
    assert "packed: 12 linears of 2 bits" in models.describe(loaded[0])
    assert loaded[1].encode_from_tokens(loaded[1].tokenize("a bonsai")).shape[-1] == 7680
    assert loaded[2].decode(torch.zeros(1, 128, 2, 2)).shape[-1] == 3


def test_a_part_of_a_checkpoint_is_named_where_another_is_missing(saved):
    with pytest.raises(Exception, match=r"a checkpoint with the text encoder of Bonsai Image, found none"):
        find_repository(saved / "ModelSave.safetensors").require("text_encoder")
