"""One model in one host for ``benchmarks/gpu.py``, in a process of its own: ``python gpu_case.py '<JSON>'``.

Prints one line of JSON last. Memory is what the device has in use beyond what it had when the process started
(polled, so that memory outside torch's allocator counts); on a CPU, the resident memory of the process. Peaks are those
of one image of their own, not timed, before each stage of which torch's allocator gives back what it keeps.
"""

import importlib
import itertools
import json
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

if __name__ == "__main__":
    CASE = json.loads(sys.argv[1])
    if CASE["kind"] == "comfyui":
        # ComfyUI's main.py does so first: its choice of allocator must come before torch.
        sys.path.insert(0, CASE["comfyui"])
        sys.argv = ["main.py", "--disable-all-custom-nodes", *CASE["flags"]]
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("cuda_malloc")

import torch

PROMPT = "a bonsai tree in a clay pot on a wooden table, morning light"
STEPS = 4


class Meter:
    """Seconds and peak megabytes of named stages."""

    def __init__(self, device: torch.device):
        self.device, self.stages = device, {}
        self.base = self._used()

    def _used(self) -> float:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return (total - free) / 1e6
        return psutil.Process().memory_info().rss / 1e6

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def stage(self, name: str, alone: bool = False):
        """``alone``: without what torch's allocator keeps from before."""
        if alone and self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.wait()
        done, peak = threading.Event(), [self._used()]

        def poll():
            while not done.wait(0.01):
                peak[0] = max(peak[0], self._used())

        thread = threading.Thread(target=poll)
        thread.start()
        start = time.perf_counter()
        try:
            yield
            self.wait()
        finally:
            seconds = time.perf_counter() - start
            done.set()
            thread.join()
        self.stages[name] = {"seconds": seconds, "peak_mb": max(peak[0], self._used()) - self.base}


def dense(tensors: dict) -> dict:
    """The same numbers without packing."""
    from bonsai_image.ops.packed import is_packed

    return {name: t.dequantize() if is_packed(t) else t for name, t in tensors.items()}


class Embedded:
    """diffusers and transformers over packed or dense weights, everything resident."""

    def __init__(self, case: dict, device: torch.device):
        from diffusers import Flux2KleinPipeline

        from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer
        from bonsai_image.ops import backends
        from bonsai_image.ops.devices import default_dtype
        from bonsai_image.standalone import generate, models

        repository, dtype = find_repository(Path(case["checkpoint"])), default_dtype(device)
        backend = backends.Setting("auto", case["precision"])
        transformer, encoder = load_transformer(repository.transformer), load_text_encoder(repository.text_encoder)
        if case["variant"] == "dense":
            transformer.tensors, encoder.tensors = dense(transformer.tensors), dense(encoder.tensors)
        self.pipeline = Flux2KleinPipeline(
            scheduler=models.scheduler(repository.scheduler), tokenizer=models.tokenizer(repository.tokenizer),
            vae=models.vae_module(repository.vae, device, dtype), is_distilled=True,
            text_encoder=models.text_encoder_module(encoder, device, dtype, backend),
            transformer=models.transformer_module(transformer, device, dtype, backend))
        self.pipeline.set_progress_bar_config(disable=True)
        self.stages, self.compute = generate, generate.Compute(device, dtype, backend)

    def encode(self):
        return self.stages.encode(self.pipeline, [PROMPT], self.compute)

    def denoise(self, condition, size: int, on_step):
        return self.stages.denoise(self.pipeline, condition, [0], size, size, STEPS, progress=lambda *_: on_step())

    def decode(self, latent):
        return self.pipeline.vae.decode(latent.to(self.compute.dtype), return_dict=False)[0]

    def after_node(self) -> None:
        """Nothing is left to do."""


class ComfyUI:
    """The real host, started as its ``main.py`` starts it, without the server."""

    def __init__(self, case: dict, device: torch.device):
        # ComfyUI's own start reads sys.argv and sets up dynamic VRAM; it must come before the rest of the host.
        importlib.import_module("main")
        import comfy.memory_management
        import comfy.model_management
        import comfy.model_prefetch
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        from comfy_extras.nodes_flux import get_schedule

        from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer
        from bonsai_image.loaders.names import to_comfyui
        from bonsai_image.nodes import models
        from bonsai_image.ops import backends

        repository = find_repository(Path(case["checkpoint"]))
        if case["variant"] == "dense":
            tensors = dict(to_comfyui(dense(load_transformer(repository.transformer).tensors)))
            self.model = comfy.sd.load_diffusion_model_state_dict(tensors)
            encoder = load_text_encoder(repository.text_encoder)
            self.clip = comfy.sd.load_text_encoder_state_dicts(
                [dense(encoder.tensors)], clip_type=comfy.sd.CLIPType.FLUX2,
                model_options={"qwen3_4b_model_config": models.text_dimensions(encoder.config)})
        else:
            backend = backends.Setting("auto", case["precision"])
            self.model = models.load_model(str(repository.transformer), setting=backend)
            self.clip = models.load_clip(str(repository.text_encoder))
        self.vae = models.load_vae_model(str(repository.vae))
        self.comfy, self.schedule = comfy, get_schedule

    def encode(self):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(PROMPT))

    def denoise(self, condition, size: int, on_step):
        latent = torch.zeros(1, 128, size // 16, size // 16)
        noise = self.comfy.sample.prepare_noise(latent, 0)
        return self.comfy.sample.sample_custom(
            self.model, noise, 1.0, self.comfy.samplers.sampler_object("euler"),
            self.schedule(STEPS, (size // 16) ** 2), condition, condition, latent, disable_pbar=True, seed=0,
            callback=lambda *_: on_step())

    def decode(self, latent):
        return self.vae.decode(latent)

    def after_node(self) -> None:
        """What the host does after every node under dynamic VRAM."""
        if self.comfy.memory_management.aimdo_enabled:
            self.comfy.model_management.reset_cast_buffers()
            self.comfy.model_prefetch.cleanup_prefetch_queues()
            importlib.import_module("comfy_aimdo.model_vbar").vbars_reset_watermark_limits()


def image(host, meter: Meter, size: int, alone: bool = False) -> dict:
    """Seconds and peaks of one image, seconds of one step (the first left out), and the latent. ``alone``: the peaks
    are each stage's own, and the times mean nothing."""
    marks = []

    def on_step():
        meter.wait()
        marks.append(time.perf_counter())

    meter.stages = {}
    with meter.stage("encode", alone):
        condition = host.encode()
        host.after_node()
    with meter.stage("denoise", alone):
        latent = host.denoise(condition, size, on_step)
        host.after_node()
    with meter.stage("decode", alone):
        host.decode(latent)
        host.after_node()
    steps = [b - a for a, b in itertools.pairwise(marks)]
    return {"size": size, "seconds": sum(stage["seconds"] for stage in meter.stages.values()),
            "step": statistics.median(steps), "stages": meter.stages, "latent": latent}


@torch.inference_mode()
def images(case: dict) -> dict:
    device = torch.device(case["device"])
    meter = Meter(device)
    with meter.stage("load"):
        host = {"embedded": Embedded, "comfyui": ComfyUI}[case["kind"]](case, device)
    result = {"load_seconds": meter.stages["load"]["seconds"], "sizes": {}}
    # The first image of the process, with an empty Triton cache on disk.
    result["first_image_seconds"] = image(host, meter, case["sizes"][0])["seconds"]
    for size in case["sizes"]:
        runs = [image(host, meter, size) for _ in range(1 + case["repeats"])][1:]
        latent = runs[0].pop("latent")
        torch.save(latent.cpu(), Path(case["latents"]) / f"{case['name']}-{size}.pt")
        peaks = image(host, meter, size, alone=True)["stages"]
        result["sizes"][size] = {
            "step_seconds": statistics.median(run["step"] for run in runs),
            "image_seconds": statistics.median(run["seconds"] for run in runs),
            "peak_mb": {name: stage["peak_mb"] for name, stage in peaks.items()}}
    new = [image(host, meter, case["new_size"])["seconds"] for _ in range(1 + case["repeats"])]
    result["new_resolution"] = {"size": case["new_size"], "first_seconds": new[0],
                                "warm_seconds": statistics.median(new[1:])}
    return result


if __name__ == "__main__":
    print(json.dumps(images(CASE)), flush=True)
