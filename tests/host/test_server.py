"""The real server: the node pack in its custom_nodes folder, an API-format graph in its queue, an image out of it."""

import asyncio
import json

import pytest
from PIL import Image

from bonsai_image.tests.support.comfyui_server import Server, graph


@pytest.fixture(scope="module")
def server(comfyui, repository, tmp_path_factory):
    running = Server(comfyui, tmp_path_factory.mktemp("server") / "base", repository)
    try:
        asyncio.run(running.wait())
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


def test_nodes_are_registered_with_their_choices(server, repository):
    info = asyncio.run(server.get("/object_info"))
    ours = {name for name in info if name.startswith("Bonsai")}
    assert ours == {"BonsaiCheckpointLoader", "BonsaiModelLoader", "BonsaiTextEncoderLoader", "BonsaiSaveModel",
                    "BonsaiModelInfo"}
    loader = info["BonsaiCheckpointLoader"]
    assert repository.name in json.dumps(loader["input"]["required"]["checkpoint"])
    assert loader["output"] == ["MODEL", "CLIP", "VAE"]
    assert all(entry[1].get("tooltip") for name in ours for part in info[name]["input"] if part != "hidden"
               for entry in info[name]["input"][part].values())


def test_text_to_image(server, repository):
    messages = asyncio.run(server.run(graph(repository.name)))
    assert messages[-1]["type"] == "execution_success", messages[-1]
    steps = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "8"]
    assert steps[-1]["value"] == steps[-1]["max"] == 2
    texts = [m["data"]["output"]["text"][0] for m in messages if m["type"] == "executed" and m["data"]["node"] == "11"]
    assert "ternary" in texts[0]
    (image,) = (server.base / "output").glob("bonsai_*.png")
    assert Image.open(image).size == (64, 48)
    assert len(set(Image.open(image).convert("L").tobytes())) > 10


def test_seed_and_prompt_change_the_image(server, repository):
    pictures = []
    for i, (seed, text) in enumerate(((21, "one"), (22, "one"), (21, "two"))):
        prompt = graph(repository.name, text, seed=seed)
        prompt["10"]["inputs"]["filename_prefix"] = f"differs{i}"
        assert asyncio.run(server.run(prompt))[-1]["type"] == "execution_success"
        pictures.append(Image.open(server.base / "output" / f"differs{i}_00001_.png").tobytes())
    assert len(set(pictures)) == 3


def test_missing_checkpoint_error_has_the_download_command(server):
    """What a node raises is shown in full; what its validation says is not."""
    last = asyncio.run(server.run(graph("bonsai-image-binary-4B-mlx-1bit")))[-1]
    assert last["type"] == "execution_error" and last["data"]["node_type"] == "BonsaiCheckpointLoader"
    message = last["data"]["exception_message"].strip()
    assert "download --variant binary" in message and "\n" not in message


def test_damaged_checkpoint_error_is_one_sentence(server, repository):
    broken = server.base / "models" / "diffusers" / "broken"
    folder = broken / "transformer-packed-mflux"
    folder.mkdir(parents=True)
    whole = (repository / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    last = asyncio.run(server.run(graph("broken")))[-1]
    assert last["type"] == "execution_error" and last["data"]["node_type"] == "BonsaiCheckpointLoader"
    message = last["data"]["exception_message"].strip()
    assert "diffusion_pytorch_model.safetensors" in message and "Download" in message and "\n" not in message
    assert asyncio.run(server.run(graph(repository.name, "after")))[-1]["type"] == "execution_success"
