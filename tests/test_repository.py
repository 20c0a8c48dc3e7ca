"""Repositories as users have them: copied by a Mac, downloaded halfway, in a cache, nested, two in one folder. Each is
found, or refused with one sentence that says what to do."""

import json
import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import (
    ModelFileError,
    find_repository,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from bonsai_image.loaders.repository import resembles_repository, snapshot
from bonsai_image.ops.packed import equal, is_packed
from bonsai_image.standalone.describe import describe
from bonsai_image.tests.support import published_files
from bonsai_image.tests.support.sound_files import FILES, WEIGHTS, load, refusal

TRANSFORMER, ENCODER = "transformer-packed-mflux", "text_encoder-mlx-4bit"
PART_LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_vae}


@pytest.fixture
def mlx(root, tmp_path) -> Path:
    """A small repository in the layout of the MLX releases: no scheduler, a tokenizer, nothing odd."""
    path = tmp_path / "bonsai-image-ternary-4B-mlx-2bit"
    for source, folder in (("mlx", TRANSFORMER), ("te-mlx", ENCODER), ("vae", "vae")):
        shutil.copytree(root / source, path / folder)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    (path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"}')
    return path


def found(path: Path) -> dict[str, str | None]:
    """Folder names of the parts."""
    repository = find_repository(path)
    return {part: getattr(repository, part) and getattr(repository, part).name
            for part in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")}


def test_links_of_a_cache_whose_blobs_are_gone_are_named(mlx):
    file = mlx / TRANSFORMER / FILES["mlx"][1]
    file.unlink()
    file.symlink_to("blobs/0123")
    with pytest.raises(ModelFileError, match=rf"found a link to nowhere, .*{file.name}; download"):
        find_repository(mlx)


def test_a_byte_order_mark_of_an_editor_is_no_damage(mlx):
    for file in mlx.rglob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert found(mlx) == PARTS and load_transformer(mlx / TRANSFORMER).config


PARTS = {"transformer": TRANSFORMER, "text_encoder": ENCODER, "vae": "vae", "tokenizer": "tokenizer", "scheduler": None}


def _macos(path: Path) -> None:
    for file in [*path.rglob("*"), *path.iterdir()]:
        if file.is_file() or file.parent == path:
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(100))


def _hub_client(path: Path) -> None:
    (path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (path / ".cache" / "huggingface" / "x.safetensors").touch()


def _twice(path: Path) -> None:
    for part in (TRANSFORMER, "vae"):
        (path / part).rename(path / "moved")
        (path / part).mkdir()
        (path / "moved").rename(path / part / part)


def _crowd(path: Path) -> None:
    (path / "loras").mkdir()
    for name in ("a", "b"):
        save_file({f"x.{name}.lora_A.weight": torch.ones(2)}, path / "loras" / f"{name}.safetensors")


SOUND = {
    "plain": lambda path: None,
    "macos": _macos,
    "hub-client": _hub_client,
    "part-in-part": _twice,
    "loras": _crowd,
    "broken-other-folder": lambda path: [(path / "old").mkdir(), (path / "old" / "a.safetensors").write_bytes(b"")],
    "second-file": lambda path: shutil.copy(path / "vae" / WEIGHTS, path / "vae" / "backup.safetensors"),
    "finetune-beside": lambda path: shutil.copytree(path / TRANSFORMER, path / "my-finetune"),
}


@pytest.mark.parametrize("case", SOUND)
def test_repository_is_found(case, mlx):
    SOUND[case](mlx)
    assert found(mlx) == PARTS
    assert resembles_repository(mlx)
    for part, loader in PART_LOADERS.items():
        assert loader(mlx).tensors.keys() == loader(getattr(find_repository(mlx), part)).tensors.keys()


def test_file_that_a_mac_has_copied(root, tmp_path):
    """Without a well-known name to tell it from the file of attributes beside it."""
    path = Path(shutil.copytree(root / "comfy", tmp_path / "comfy"))
    (path / "._bonsai.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert load_transformer(path).path == path / "bonsai.safetensors"
    assert not resembles_repository(path)


def test_repository_in_a_folder_of_its_own(mlx, tmp_path):
    assert found(tmp_path) == PARTS


@pytest.mark.parametrize("main", [True, False], ids=["refs", "one-snapshot"])
def test_hugging_face_cache(mlx, tmp_path, main):
    """The root of an entry, whose snapshots are links to blobs."""
    entry = tmp_path / "hub" / "models--prism-ml--bonsai-image-ternary-4B-mlx-2bit"
    commit = entry / "snapshots" / "2c24c81b934a658ba5590cf39088ba929985b4a8"
    for file in [file for file in mlx.rglob("*") if file.is_file()]:
        blob = entry / "blobs" / str(len(list(entry.rglob("*"))))
        blob.parent.mkdir(parents=True, exist_ok=True)
        link = commit / file.relative_to(mlx)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (entry / "snapshots" / "older" / TRANSFORMER).mkdir(parents=True)
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(commit.name)
    assert found(entry) == PARTS and resembles_repository(entry) and snapshot(entry) == commit
    assert load_transformer(entry).source == f"prism-ml/bonsai-image-ternary-4B-mlx-2bit@{commit.name}"


def test_hugging_face_cache_with_several_snapshots(mlx, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(mlx, tmp_path / "models--x" / "snapshots" / name)
    assert "choose one of the folders in snapshots" in refusal(find_repository, tmp_path / "models--x")
    (tmp_path / "models--x" / "refs").mkdir()
    (tmp_path / "models--x" / "refs" / "main").write_text("../../b")
    assert "2 snapshots" not in refusal(find_repository, tmp_path / "models--x")


def test_unfinished_download(mlx):
    partial = mlx.rename(mlx.with_name(f"{mlx.name}.partial"))
    assert "found an interrupted one; run the same bonsai-image download command again" in refusal(find_repository,
                                                                                                  partial)
    assert not resembles_repository(partial)


@pytest.mark.parametrize("names", [("transformer-gemlite-int1", "transformer-gemlite-int2"), ("mine", "yours")])
def test_two_diffusion_models_are_refused_by_name(names, mlx):
    shutil.copytree(mlx / TRANSFORMER, mlx / names[0])
    (mlx / TRANSFORMER).rename(mlx / names[1])
    message = refusal(find_repository, mlx)
    assert f"expected one transformer, found {names[0]} and {names[1]}; choose one of these folders" in message


def test_a_damaged_part_counts_once_it_is_asked_for(mlx):
    os.truncate(mlx / ENCODER / "model.safetensors", 99)
    repository = find_repository(mlx)
    assert repository.text_encoder is None and repository.require("vae") == mlx / "vae"
    with pytest.raises(ModelFileError, match="expected a whole safetensors file"):
        repository.require("vae", "text_encoder")
    problems = [part for part in describe(mlx) if part["problems"]]
    assert [part["kind"] for part in problems] == ["text encoder"] and "whole safetensors" in problems[0]["problems"][0]


def test_a_part_that_is_missing(mlx):
    shutil.rmtree(mlx / "vae")
    assert "expected a folder with the vae of Bonsai Image, found none; download the whole repository again" in refusal(
        load_vae, mlx)


def test_folder_that_cannot_be_read(mlx, monkeypatch):
    listed = Path.iterdir
    (mlx / "private").mkdir()

    def iterdir(path):
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert found(mlx) == PARTS
    shutil.move(mlx / TRANSFORMER, mlx.parent / "elsewhere")
    assert "private: expected a readable folder, found Permission denied" in refusal(
        lambda _: find_repository(mlx), mlx / "private")


# Files that are something else.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:e240c0bd\nsize 2263022529\n"


@pytest.mark.parametrize(("file", "text"), [
    (f"{TRANSFORMER}/{WEIGHTS}", POINTER), (f"{TRANSFORMER}/config.json", POINTER),
    (f"{TRANSFORMER}/{WEIGHTS}", b"<!DOCTYPE html><title>Hugging Face</title>")], ids=["lfs", "lfs-json", "html"])
def test_what_lies_in_the_place_of_a_file(file, text, mlx):
    (mlx / file).write_bytes(text)
    message = refusal(lambda _: load_transformer(mlx / TRANSFORMER), mlx / file)
    if text is POINTER:
        assert f"found a git-lfs pointer, not the file itself; run git lfs pull in {(mlx / file).parent}." in message
    else:
        assert "found a web page, not the file itself; download the file again." in message


@pytest.mark.parametrize("part", PART_LOADERS)
@pytest.mark.parametrize("other", PART_LOADERS)
def test_wrong_part_in_the_wrong_list(part, other, mlx):
    words = {"transformer": "diffusion model", "text_encoder": "text encoder", "vae": "VAE"}
    if part != other:
        message = refusal(PART_LOADERS[part], mlx / PARTS[other])
        expected, found = (f"the {words[name]} of Bonsai Image" for name in (part, other))
        assert f"expected {expected}, found {found}; choose" in message


OTHERS = {
    "a FLUX.1 model": ("double_blocks.0.img_mod.lin.weight", "transformer_blocks.0.norm1_context.linear.weight"),
    "a LoRA": ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",
               "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "base_model.model.x.lokr_w1"),
    "the VAE of another model": ("decoder.conv_in.weight",),
}


@pytest.mark.parametrize(("found", "name"), [(found, name) for found, names in OTHERS.items() for name in names])
@pytest.mark.parametrize("part", PART_LOADERS)
def test_file_of_another_kind(part, found, name, tmp_path):
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert f"found {found}; choose" in refusal(PART_LOADERS[part], tmp_path / "a.safetensors")


# What loading may rely on.

@pytest.mark.parametrize("name", ["mlx", "gemlite", "comfy", "base3", "unpacked", "te-hqq", "vae"])
def test_without_mmap_nothing_stays_on_disk(name, root, tmp_path):
    path = Path(shutil.copytree(root / name, tmp_path / name))
    loaded = FILES[name][0](path, mmap=False)
    os.truncate(path / FILES[name][1], 0)  # a mapped tensor would now end the process
    expected = load(name, root / name)
    assert loaded.tensors.keys() == expected.keys()
    assert all(equal(tensor, expected[key]) if is_packed(tensor) else torch.equal(tensor, expected[key])
               for key, tensor in loaded.tensors.items())


def test_names_of_variants_are_true(root, tmp_path):
    model = load_transformer(root / "mlx")
    assert model.variant == "ternary"
    tensors = load_file(root / "mlx" / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".biases")]:
        tensors[name] = tensors[name] * 0.5
    shutil.copytree(root / "mlx", tmp_path / "affine")
    save_file(tensors, tmp_path / "affine" / WEIGHTS)
    assert load_transformer(tmp_path / "affine").variant == "2-bit affine"
    save_transformer(model, tmp_path / "gemlite", "gemlite")
    assert (tmp_path / "gemlite" / "gemlite_autotune.json").read_text() == "{}"
    assert '"packing_bitwidth": 8' in (tmp_path / "gemlite" / "quantization_config.json").read_text()


# Details of the published files.

def test_gemlite_layout(root, tmp_path):
    """No scheduler, the tokenizer inside the text encoder, an OrderedDict with ``_metadata`` from a GPU."""
    path = tmp_path / "bonsai-image-ternary-4B-gemlite-2bit"
    state = OrderedDict(torch.load(root / "gemlite" / "state_dict.pt", weights_only=True))
    state._metadata = OrderedDict({"": {"version": 1}})
    folder = path / "transformer-gemlite-int2"
    published_files.save_as_cuda(state, folder / "state_dict.pt")
    with zipfile.ZipFile(folder / "state_dict.pt") as archive:
        assert b"cuda:0" in archive.read("state_dict/data.pkl")
    known = {key: value for key, value in published_files.TRANSFORMER_JSON.items() if key.startswith(("musubi", "_"))}
    published_files.write_json(folder / "config.json", {**known, "out_channels": None, "rope_theta": 2000})
    published_files.write_json(folder / "gemlite_autotune.json", {})
    shutil.copytree(root / "te-hqq", path / "text_encoder-hqq-4bit")
    published_files.tokenizer(path / "text_encoder-hqq-4bit" / "tokenizer")
    shutil.copytree(root / "vae", path / "vae")
    assert found(path) == {"transformer": folder.name, "text_encoder": "text_encoder-hqq-4bit", "vae": "vae",
                           "tokenizer": "tokenizer", "scheduler": None}
    loaded, original = load_transformer(path), load_transformer(root / "gemlite")
    assert not loaded.warnings and all(
        equal(tensor, original.tensors[name]) if is_packed(tensor) else torch.equal(tensor, original.tensors[name])
        for name, tensor in loaded.tensors.items())
    assert load_text_encoder(path).warnings == []


def test_mlx_layout(mlx):
    """No ``__metadata__`` in the transformer, an index beside the one file of the text encoder."""
    save_file(load_file(mlx / TRANSFORMER / WEIGHTS), mlx / TRANSFORMER / WEIGHTS)
    names = load_file(mlx / ENCODER / "model.safetensors")
    published_files.write_json(mlx / ENCODER / "model.safetensors.index.json", {
        "metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    assert load_transformer(mlx).metadata == {} and load_transformer(mlx).warnings == []
    assert load_text_encoder(mlx).warnings == []


def test_published_vae_configuration_is_built_without_a_word(mlx, capfd, caplog):
    from bonsai_image.standalone.models import vae_module

    config = json.loads((mlx / "vae" / "config.json").read_text())
    published_files.write_json(mlx / "vae" / "config.json", {
        **config, "force_upcast": True, "_name_or_path": "black-forest-labs/FLUX.2-dev",
        "decoder_block_out_channels": None})
    vae_module(mlx / "vae", torch.device("cpu"), torch.float32)
    assert not caplog.records and "force_upcast" not in capfd.readouterr().err
