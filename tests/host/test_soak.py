"""Many prompts through the real server: variants, sizes, batches, LoRAs, references, cancels and unloads mixed.

40 prompts by default; SOAK_PROMPTS=200 for the long one, whose figures the test prints (run it with ``-s``).

What may grow, and why it is no leak: for every new shape of a BF16 product, oneDNN keeps kernels as long as the process
lives. All the products of a LoRA on this model together take 5.3 MB for each new number of rows and each new rank, in
torch alone as much as here. So the first prompts go through every number of rows with every rank, both turns of a
picture in the decoder, an edit and a cancel; only then is growth counted.
"""

import asyncio
import os
import random
import sys
from dataclasses import dataclass
from statistics import median

import psutil
import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import load_transformer
from bonsai_image.ops.packed import is_packed
from bonsai_image.tests.support.comfyui_server import Server, graph

PROMPTS = int(os.environ.get("SOAK_PROMPTS", "40"))
SIZES = ((64, 48), (96, 80), (48, 64))
#: When to cancel: the message of the host that is answered with /interrupt. While the text is encoded, between two
#: steps, while the picture is decoded.
CANCELS = (("executing", "2"), ("progress", "8"), ("executing", "9"))


@dataclass(frozen=True)
class Kind:
    size: tuple[int, int]
    batch: int
    reference: bool
    loras: int
    cancel: tuple[str, str] | None = None
    unload: bool = False


#: The last of the sizes has as many rows as the first, and is new to the decoder only.
WARM_UP = [*(Kind(size, batch, reference, loras) for size in SIZES[:2] for batch in (1, 2)
             for reference in (False, True) for loras in (1, 2)),
           *(Kind(SIZES[2], batch, False, 0) for batch in (1, 2)),
           Kind(SIZES[0], 1, True, 1, CANCELS[1]), Kind(SIZES[1], 2, False, 2, CANCELS[2]),
           *(Kind(SIZES[0], 1, False, 2, unload=True) for _ in range(2))]
#: Growth allowed after that, in MB: of the median after each of the first 20 prompts that count (fewer in a short run)
#: to the median of as many at the end. Private memory holds everything computed; mapped are the pages of libraries and
#: model files, 7 MB more while the binary model is in use.
ALLOWED_GROWTH = {"private": 4, "mapped": 10}

#: glibc gives freed blocks of this size back at once, so that resident memory is memory in use. By default it keeps
#: up to 70 MB of them in its heap, more or less as the sizes of the prompts happen to follow each other.
MALLOC = (("MALLOC_MMAP_THRESHOLD_", str(1 << 20)), ("MALLOC_TRIM_THRESHOLD_", str(1 << 20)))


@pytest.fixture(scope="module")
def server(comfyui, repository, binary_transformer, tmp_path_factory):
    base = tmp_path_factory.mktemp("soak") / "base"
    # The default cache keeps the outputs of old prompts until memory is short, which would hide a leak.
    running = Server(comfyui, base, repository, options=("--cache-classic",), environment=MALLOC)
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


def kind(rng: random.Random, number: int) -> Kind:
    if number < len(WARM_UP):
        return WARM_UP[number]
    return Kind(rng.choice(SIZES), rng.choice((1, 2)), rng.random() < 0.5, rng.choice((0, 0, 1, 2)),
                rng.choice(CANCELS) if rng.random() < 0.15 else None, rng.random() < 0.1)


def mixed(checkpoint: str, rng: random.Random, number: int, kind: Kind) -> dict:
    """The text-to-image graph as ``kind`` asks, with everything else at random."""
    prompt = graph(checkpoint, f"prompt {number % 7}", *kind.size, number)
    prompt["6"]["inputs"]["batch_size"] = kind.batch
    if rng.random() < 0.5:
        prompt["20"] = {"class_type": "BonsaiModelLoader", "inputs": {"model_name": "binary.safetensors"}}
        prompt["7"]["inputs"]["model"] = ["20", 0]
    for i in range(kind.loras):
        prompt[f"3{i}"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
            "model": prompt["7"]["inputs"]["model"], "lora_name": f"lora{i}.safetensors",
            "strength_model": round(rng.uniform(-1, 1), 2)}}
        prompt["7"]["inputs"]["model"] = [f"3{i}", 0]
    if kind.reference:
        prompt["40"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["41", 0], "vae": ["1", 2]}}
        prompt["41"] = {"class_type": "EmptyImage", "inputs": {
            "width": 64, "height": 64, "batch_size": 1, "color": rng.randrange(1 << 24)}}
        prompt["42"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["2", 0], "latent": ["40", 0]}}
        prompt["7"]["inputs"]["conditioning"] = ["42", 0]
    return prompt


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory that Linux counts as private")
def test_soak(server, repository):
    rng = random.Random(0)
    process = psutil.Process(server.process.pid)
    memory, ends = {part: [] for part in ALLOWED_GROWTH}, []
    for number in range(PROMPTS):
        now = kind(rng, number)
        ends.append(asyncio.run(server.run(mixed(repository.name, rng, number, now), cancel_at=now.cancel))[-1]["type"])
        if now.unload:  # after it, and the next prompt finds what the host has kept
            asyncio.run(server.post("/free", {"unload_models": True}))
        # The host may be done before it hears of a cancel.
        allowed = {"execution_success", "execution_interrupted"} if now.cancel else {"execution_success"}
        assert ends[-1] in allowed, (number, now, ends[-1], server.log.read_text()[-3000:])
        used = process.memory_info()
        memory["private"].append((used.rss - used.shared) / 1e6)
        memory["mapped"].append(used.shared / 1e6)
    cancelled = ends.count("execution_interrupted")
    print(f"\n{len(ends)} prompts, {cancelled} cancelled")
    assert cancelled > 0
    window = min(20, (PROMPTS - len(WARM_UP)) // 2)
    for part, allowed in ALLOWED_GROWTH.items():
        first, last = (median(values) for values in (memory[part][len(WARM_UP):][:window], memory[part][-window:]))
        print(f"{part} memory: median {first:.1f} MB in the first {window} prompts after {len(WARM_UP)}, {last:.1f} in "
              f"the last; after every tenth: {', '.join(f'{value:.0f}' for value in memory[part][9::10])}")
        assert last - first < allowed
