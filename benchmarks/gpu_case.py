"""One measurement of ``benchmarks/gpu.py``, in a process of its own: ``python gpu_case.py '<JSON>'``.

Prints one line of JSON last. Memory is what the device has in use beyond what it had when the process started
(polled, so that memory outside torch's allocator counts); on a CPU, the resident memory of the process. Peaks are those
of one image of their own, not timed, before each stage of which torch's allocator gives back what it keeps.
"""

from __future__ import annotations

import functools
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
ROOT = Path(__file__).resolve().parent.parent

#: (N, K) of the packed layers of FLUX.2 Klein 4B as ComfyUI names them, and the MLP of the text encoder (4 bits).
LAYERS = ((3072, 3072), (9216, 3072), (18432, 3072), (3072, 9216), (27648, 3072), (3072, 12288))
TEXT_LAYERS = ((9728, 2560), (2560, 9728))
ROWS = (1, 16, 64, 128, 256, 512, 1024, 1536, 4096, 4608)


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
        from bonsai_image.standalone import models

        pack, dtype = find_repository(Path(case["pack"])), default_dtype(device)
        backend = backends.select("auto", case["precision"])
        transformer, encoder = load_transformer(pack.transformer), load_text_encoder(pack.text_encoder)
        if case["variant"] == "dense":
            transformer.tensors, encoder.tensors = dense(transformer.tensors), dense(encoder.tensors)
        self.pipeline = Flux2KleinPipeline(
            scheduler=models.scheduler(pack.scheduler), tokenizer=models.tokenizer(pack.tokenizer), is_distilled=True,
            vae=models.vae_module(pack.vae, device, dtype),
            text_encoder=models.text_encoder_module(encoder, device, dtype, backend),
            transformer=models.transformer_module(transformer, device, dtype, backend))
        self.pipeline.set_progress_bar_config(disable=True)
        self.device, self.dtype = device, dtype

    def encode(self):
        return self.pipeline.encode_prompt(PROMPT, device=self.device)[0].to(self.dtype)

    def denoise(self, condition, size: int, on_step):
        def advance(_pipeline, _step, _timestep, tensors):
            on_step()
            return tensors

        return self.pipeline(prompt_embeds=condition, width=size, height=size, num_inference_steps=STEPS,
                             guidance_scale=1.0, generator=torch.Generator("cpu").manual_seed(0),
                             output_type="latent", callback_on_step_end=advance).images

    def decode(self, latent):
        return self.pipeline.vae.decode(latent.to(self.dtype), return_dict=False)[0]

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

        pack = find_repository(Path(case["pack"]))
        if case["variant"] == "dense":
            tensors = dict(to_comfyui(dense(load_transformer(pack.transformer).tensors)))
            self.model = comfy.sd.load_diffusion_model_state_dict(tensors)
            encoder = load_text_encoder(pack.text_encoder)
            options = {"qwen3_4b_model_config": {"num_hidden_layers": encoder.config.layers,
                                                 "vocab_size": encoder.config.vocab,
                                                 "intermediate_size": encoder.config.mlp,
                                                 "num_attention_heads": encoder.config.heads,
                                                 "num_key_value_heads": encoder.config.kv_heads}}
            self.clip = comfy.sd.load_text_encoder_state_dicts(
                [dense(encoder.tensors)], clip_type=comfy.sd.CLIPType.FLUX2, model_options=options)
        else:
            backend = backends.select("auto", case["precision"])
            self.model = models.load_model(str(pack.transformer), backend=backend)
            self.clip = models.load_clip(str(pack.text_encoder))
        self.vae = models.load_vae_model(str(pack.vae))
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


def milliseconds(function, device: torch.device, flush: torch.Tensor) -> float:
    """Median time of a call with a cold second-level cache, as between the layers of a model."""
    times = []
    for _ in range(3 + 10 if device.type == "cuda" else 2):
        flush.zero_()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[len(times) // 4:])


@torch.inference_mode()
def kernels(case: dict) -> dict:
    """Every way on every layer and number of rows: milliseconds, and the relative error against FP32."""
    device = torch.device(case["device"])
    layers, text_layers, all_rows = LAYERS, TEXT_LAYERS, ROWS
    if case["tiny"]:
        sys.path.insert(0, str(ROOT / "tests" / "lab"))
        import interpreter  # noqa: F401 (our Triton kernels on the CPU)

        layers, text_layers, all_rows = ((256, 256), (384, 512)), ((192, 256),), (1, 70)
    from bonsai_image.ops import accelerator, int8_reference, torch_backend
    from bonsai_image.ops.devices import default_dtype

    dtype, flush = default_dtype(device), torch.empty(1 if case["tiny"] else 256_000_000, dtype=torch.uint8,
                                                          device=device)
    rows_of_table = []
    kinds = [(bits, "symmetric", 128, shape) for bits in (2, 1) for shape in layers]
    kinds += [(4, "affine", 64, shape) for shape in text_layers]
    for bits, form, group, (n, k) in kinds:
        codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
        scale = torch.rand(n, k // group, device=device).add(0.5).mul(k**-0.5).bfloat16()
        shift = None if form == "symmetric" else -7.5 * scale
        weight = torch_backend.dequantize(codes, scale, shift, bits, form, dtype)
        for m in all_rows:
            x = torch.randn(m, k, device=device).to(dtype)
            expected = x.float() @ weight.float().t()
            ways = {"dense": functools.partial(torch.nn.functional.linear, x, weight)}
            for way in ("torch", "triton", "gemlite", "int8"):
                if way == "int8" and form != "symmetric":
                    continue
                usable = way == "torch" or (case["tiny"] and way != "gemlite") or (
                    not case["tiny"] and accelerator.works(way, device, bits, form, group, dtype, scale.dtype))
                if usable:
                    ways[way] = functools.partial(accelerator.multiply, way, x, codes, scale, shift, bits, form)
            for way, function in ways.items():
                target = int8_reference.fast(x, codes, scale, bits) if way == "int8" else expected
                out = function().float()
                rows_of_table.append({
                    "bits": bits, "n": n, "k": k, "rows": m, "way": way,
                    "error": float((out - target).norm() / target.norm()),
                    "error_of_activations": float((target - expected).norm() / expected.norm()),
                    "tolerance": max(torch.finfo(dtype).eps, 2**-9),
                    "ms": milliseconds(function, device, flush)})
    return {"rows": rows_of_table, "gemlite_rows": _gemlite_rows(rows_of_table)}


def _gemlite_rows(table: list[dict]) -> int | None:
    """What to enter for this card in ``ops/choice.py``: rows up to which GemLite won on every layer of the model."""
    times = {(r["bits"], r["n"], r["k"], r["rows"], r["way"]): r["ms"] for r in table if r["bits"] <= 2}
    lost = [key[3] for key, ms in times.items() if key[4] == "gemlite" and ms > times.get((*key[:4], "triton"), 0)]
    tried = sorted({key[3] for key in times if key[4] == "gemlite"})
    return None if not tried else max((rows for rows in tried if rows < min(lost, default=1 << 30)), default=0)


if __name__ == "__main__":
    print(json.dumps((kernels if CASE["kind"] == "kernels" else images)(CASE)), flush=True)
