"""Text (and reference images) to images through diffusers' ``Flux2KleinPipeline``, one stage at a time so that each
part's memory is freed."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..loaders import ModelFileError, find_repository, load_text_encoder, load_transformer
from ..loaders.files import Progress, tensor_files
from ..ops import backends
from ..ops.mlx import backend as mlx_backend
from ..ops.packed import is_packed, packed_nbytes
from . import models

SIZE_STEP = 16
#: What FLUX.2 Klein pads and cuts a prompt to, where the tokenizer states no less.
MAX_TOKENS = 512


@dataclass
class Result:
    """An image for each prompt, with what they took: seconds and megabytes (process memory, or device memory on CUDA)
    per stage."""

    images: list[Image.Image]
    settings: dict[str, Any]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the first image as a PNG."""
        save_png(self.images[0], self.settings, path)


def save_png(image: Image.Image, settings: dict[str, Any], path: Path) -> None:
    """Write a PNG whose ``bonsai`` text chunk holds ``settings`` as JSON."""
    info = PngInfo()
    info.add_text("bonsai", json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=info)


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


@contextmanager
def _stage(name: str, stages: dict, device: torch.device, progress: bool, total: int = 1) -> Iterator[tqdm]:
    """Time a stage, show its bar, and note the memory in use at its end."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with tqdm(total=total, desc=f"{name:<20}", disable=not progress, bar_format="{desc}{bar:24} {elapsed}") as bar:
        yield bar
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        bar.update(bar.total - bar.n)
    stages[name] = {"seconds": time.perf_counter() - start, "megabytes": _memory_mb(device)}


def _follow(bar: tqdm) -> Progress:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress


@torch.inference_mode()
def generate(
    pack: Path,
    prompts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    width: int = 1024,
    height: int = 1024,
    steps: int = 4,
    seed: int = 0,
    progress: bool = True,
    images: Sequence[Image.Image] = (),
    transformer: Path | None = None,
    dense: Path | None = None,
) -> Result:
    """Draw ``prompts`` with the repository folder ``pack``, each from the noise of the same ``seed``.

    ``images`` are references for an edit. ``transformer`` replaces the diffusion model of the pack by another file or
    folder, ``dense`` by a folder of diffusers' with ordinary weights, to compare with. Raises ModelFileError on an
    unusable pack, ValueError on a size that is not a multiple of 16 or on fewer than one step.
    """
    if width < SIZE_STEP or height < SIZE_STEP or width % SIZE_STEP or height % SIZE_STEP:
        raise ValueError(f"width and height must be positive multiples of {SIZE_STEP}, got {width} x {height}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if transformer is not None:
        tensor_files(transformer)  # says now what is wrong with the path, not after the prompt is encoded
    repository = find_repository(pack)
    for part in ("text_encoder", "tokenizer", "vae"):
        if getattr(repository, part) is None:
            raise ModelFileError(pack, f"a folder with the {part.replace('_', ' ')}", "none",
                                 "download the whole repository")
    stages: dict[str, dict[str, float]] = {}
    served = backends.resolve(backend, device)

    with _stage("load text encoder", stages, device, progress) as bar:
        loaded = load_text_encoder(repository.text_encoder, _follow(bar))
        encoder = models.text_encoder_module(loaded, device, dtype, backend)
        pipeline = Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=None, text_encoder=encoder,
                                      tokenizer=models.tokenizer(repository.tokenizer), transformer=None)
    with _stage("encode prompt", stages, device, progress):
        length = min(MAX_TOKENS, pipeline.tokenizer.model_max_length)
        embeddings, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
        embeddings = embeddings.to(dtype)
    del encoder, loaded, pipeline
    if served == "mlx":
        mlx_backend.clear_cache()

    with _stage("load diffusion model", stages, device, progress) as bar:
        settings = {"prompt": prompts[0] if len(prompts) == 1 else list(prompts), "width": width, "height": height,
                    "steps": steps, "seed": seed, "dtype": str(dtype).removeprefix("torch."), "device": str(device),
                    "backend": served}
        if dense is not None:
            module = models.dense_transformer(dense, device, dtype)
            settings |= {"variant": "dense", "format": "dense", "source": dense.name, "packed_bytes": 0}
        else:
            loaded = load_transformer(transformer or repository.transformer, _follow(bar))
            if loaded.config.text_width != embeddings.shape[-1]:
                raise ModelFileError(
                    loaded.path, f"a model for text {embeddings.shape[-1]} wide, as that of {pack.name}",
                    f"one for {loaded.config.text_width}", "choose a pack and a transformer of one family")
            packed = sum(packed_nbytes(tensor) for tensor in loaded.tensors.values() if is_packed(tensor))
            settings |= {"variant": loaded.variant, "format": loaded.format, "source": loaded.source,
                         "packed_bytes": packed}
            module = models.transformer_module(loaded, device, dtype, backend)
            del loaded
    with _stage("load VAE", stages, device, progress):
        vae = models.vae_module(repository.vae, device, dtype)
        pipeline = Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=vae, text_encoder=None,
                                      tokenizer=None, transformer=module, is_distilled=True)
        pipeline.set_progress_bar_config(disable=True)
    with _stage("denoise", stages, device, progress, total=steps) as bar:

        def advance(_pipeline, _step, _timestep, tensors):
            bar.update()
            return tensors

        # Drawn on the CPU, so that a seed means the same noise on every device; one each, so that a picture does not
        # depend on those beside it.
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        latents = pipeline(image=list(images) or None, prompt_embeds=embeddings, width=width, height=height,
                           num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="latent",
                           callback_on_step_end=advance).images
    if served == "mlx":
        mlx_backend.clear_cache()
    with _stage("decode image", stages, device, progress):
        decoded = vae.decode(latents.to(dtype), return_dict=False)[0]
        pictures = pipeline.image_processor.postprocess(decoded.float(), output_type="pil")
    return Result(pictures, settings, stages)
