"""Many prompts through the real server: variants, sizes, batches, LoRAs, references and cancels mixed.

40 prompts by default; SOAK_PROMPTS=200 for the long one, whose figures the test prints (run it with ``-s``).
"""

from __future__ import annotations

import asyncio
import os
import random

import psutil
import pytest
import torch
from safetensors.torch import save_file
from test_server import Server, graph

from bonsai_image.loaders import load_transformer
from bonsai_image.ops.packed import is_packed

PROMPTS = int(os.environ.get("SOAK_PROMPTS", "40"))
WARM_UP = 20
#: Growth allowed from the end of the warm-up to the end, in MB: allocator noise, not a leak that a prompt would leave.
ALLOWED_GROWTH = 150


@pytest.fixture(scope="module")
def server(comfyui, pack, binary_transformer, tmp_path_factory):
    base = tmp_path_factory.mktemp("soak") / "base"
    # The default cache keeps the outputs of old prompts until memory is short, which would hide a leak.
    running = Server(comfyui, base, pack, options=("--cache-classic",))
    models = base / "models"
    (models / "diffusion_models").mkdir()
    (models / "diffusion_models" / "binary.safetensors").symlink_to(binary_transformer)
    (models / "loras").mkdir()
    tensors = load_transformer(binary_transformer).tensors
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        file = {}
        for name, tensor in tensors.items():
            if is_packed(tensor):
                (n, k), layer = tensor.shape, f"diffusion_model.{name.removesuffix('.weight')}"
                file[f"{layer}.lora_up.weight"] = torch.randn(n, 8, generator=generator).half()
                file[f"{layer}.lora_down.weight"] = (torch.randn(8, k, generator=generator) * 0.01).half()
        save_file(file, models / "loras" / f"lora{i}.safetensors")
    try:
        asyncio.run(running.wait())
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


#: Width, height, batch and whether there is a reference image. The first prompts go through all of them, because torch
#: and its libraries keep buffers and kernels for every new shape.
SHAPES = [(*size, batch, reference) for size in ((64, 48), (48, 64), (96, 80)) for batch in (1, 2)
          for reference in (False, True)]


def mixed(pack: str, rng: random.Random, number: int) -> dict:
    """A random variation of the text-to-image graph."""
    width, height, batch, reference = SHAPES[number] if number < len(SHAPES) else rng.choice(SHAPES)
    prompt = graph(pack, f"prompt {number % 7}", width, height, number)
    prompt["6"]["inputs"]["batch_size"] = batch
    if rng.random() < 0.5:
        prompt["20"] = {"class_type": "BonsaiModelLoader", "inputs": {"model_name": "binary.safetensors"}}
        prompt["7"]["inputs"]["model"] = ["20", 0]
    for i in range(rng.choice([0, 0, 1, 2])):
        prompt[f"3{i}"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
            "model": prompt["7"]["inputs"]["model"], "lora_name": f"lora{i}.safetensors",
            "strength_model": round(rng.uniform(-1, 1), 2)}}
        prompt["7"]["inputs"]["model"] = [f"3{i}", 0]
    if reference:
        prompt["40"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["41", 0], "vae": ["1", 2]}}
        prompt["41"] = {"class_type": "EmptyImage", "inputs": {
            "width": 64, "height": 64, "batch_size": 1, "color": rng.randrange(1 << 24)}}
        prompt["42"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["2", 0], "latent": ["40", 0]}}
        prompt["7"]["inputs"]["conditioning"] = ["42", 0]
    return prompt


async def run(server: Server, prompt: dict, cancel: bool) -> str:
    if not cancel:
        return (await server.run(prompt))[-1]["type"]
    running = asyncio.create_task(server.run(prompt))
    await asyncio.sleep(0.3)
    await server.post("/interrupt")
    return (await running)[-1]["type"]


def test_soak(server, pack):
    rng = random.Random(0)
    process = psutil.Process(server.process.pid)
    memory, ends = [], []
    for number in range(PROMPTS):
        cancel = number >= len(SHAPES) and rng.random() < 0.15
        ends.append(asyncio.run(run(server, mixed(pack.name, rng, number), cancel)))
        allowed = {"execution_success", "execution_interrupted"} if cancel else {"execution_success"}
        assert ends[-1] in allowed, (number, ends[-1], server.log.read_text()[-3000:])
        memory.append(process.memory_info().rss / 1e6)
    settled, last = max(memory[WARM_UP - 5 : WARM_UP]), max(memory[-5:])
    print(f"\n{len(ends)} prompts, {ends.count('execution_interrupted')} cancelled; resident {settled:.0f} MB after "
          f"{WARM_UP}, {last:.0f} at the end; every tenth: {', '.join(f'{value:.0f}' for value in memory[9::10])}")
    assert last - settled < ALLOWED_GROWTH
