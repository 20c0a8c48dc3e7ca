"""Text (and reference images) to images through diffusers' ``Flux2KleinPipeline``, one stage at a time so that each
part's memory is freed when its stage returns."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..loaders import ModelFileError, Repository, find_repository, load_text_encoder, load_transformer
from ..loaders.files import Progress, no_progress
from ..loaders.opening import tensor_files
from ..ops import backends
from ..ops.mlx import backend as mlx_backend
from ..ops.packed import is_packed, packed_nbytes
from . import models

SIZE_STEP = 16
#: What FLUX.2 Klein pads and cuts a prompt to, where the tokenizer states no less.
MAX_TOKENS = 512


class Compute(NamedTuple):
    """Where and how a model runs: its device, the dtype of its activations, what multiplies its packed weights."""

    device: torch.device
    dtype: torch.dtype
    setting: backends.Setting = backends.AUTO


@dataclass
class Result:
    """An image for each prompt, with what they took: seconds and megabytes (process memory, or device memory on CUDA)
    per stage."""

    images: list[Image.Image]
    settings: dict[str, Any]
    stages: dict[str, dict[str, float]]

    def save(self, path: Path) -> None:
        """Write the first image as a PNG."""
        save_png(self.images[0], self.settings, path)


def save_png(image: Image.Image, settings: dict[str, Any], path: Path) -> None:
    """Write a PNG whose ``bonsai`` text chunk holds ``settings`` as JSON."""
    info = PngInfo()
    info.add_text("bonsai", json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=info)


class Stages:
    """Times stages: ``figures`` has the seconds of each and the megabytes in use at its end (on CUDA its peak)."""

    def __init__(self, device: torch.device, progress: bool):
        self.figures: dict[str, dict[str, float]] = {}
        self._device, self._progress = device, progress

    @contextmanager
    def run(self, name: str, total: int = 1) -> Iterator[Progress]:
        """One stage, with a progress bar. Yields what moves the bar."""
        gc.collect()
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        with tqdm(total=total, desc=f"{name:<20}", disable=not self._progress,
                  bar_format="{desc}{bar:24} {elapsed}") as bar:
            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield advance
            if cuda:
                torch.cuda.synchronize(self._device)
            bar.update(bar.total - bar.n)
        used = torch.cuda.max_memory_allocated(self._device) if cuda else psutil.Process().memory_info().rss
        self.figures[name] = {"seconds": time.perf_counter() - start, "megabytes": used / 1e6}


def check_settings(width: int, height: int, steps: int) -> None:
    """Raises ValueError on a size that is not a multiple of 16 or on fewer than one step."""
    if width < SIZE_STEP or height < SIZE_STEP or width % SIZE_STEP or height % SIZE_STEP:
        raise ValueError(f"width and height must be positive multiples of {SIZE_STEP}, got {width} x {height}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def complete_repository(folder: Path) -> Repository:
    """The parts of a repository folder that drawing needs. Raises ModelFileError where one is missing."""
    repository = find_repository(folder)
    repository.require("text_encoder", "tokenizer", "vae")
    return repository


def text_pipeline(repository: Repository, compute: Compute, progress: Progress = no_progress) -> Flux2KleinPipeline:
    """A pipeline with the text encoder and the tokenizer alone."""
    encoder = models.text_encoder_module(load_text_encoder(repository.text_encoder, progress), *compute)
    return Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=None, text_encoder=encoder,
                              tokenizer=models.tokenizer(repository.tokenizer), transformer=None)


def encode(pipeline: Flux2KleinPipeline, prompts: Sequence[str], compute: Compute) -> torch.Tensor:
    """Prompts -> embeddings ``(prompts, tokens, channels)`` in ``compute.dtype``."""
    length = min(MAX_TOKENS, pipeline.tokenizer.model_max_length)
    embeddings, _ = pipeline.encode_prompt(list(prompts), device=compute.device, max_sequence_length=length)
    return embeddings.to(compute.dtype)


def image_pipeline(repository: Repository, transformer: torch.nn.Module, compute: Compute) -> Flux2KleinPipeline:
    """A pipeline with ``transformer`` and the repository's VAE, without a text encoder."""
    vae = models.vae_module(repository.vae, compute.device, compute.dtype)
    pipeline = Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=vae, text_encoder=None,
                                  tokenizer=None, transformer=transformer, is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoise(pipeline: Flux2KleinPipeline, embeddings: torch.Tensor, seeds: Sequence[int], width: int, height: int,
            steps: int, images: Sequence[Image.Image] = (), step_done: Callable[[int], None] = lambda done: None,
            ) -> torch.Tensor:
    """Embeddings ``(N, tokens, channels)`` and as many seeds -> latents ``(N, C, height / 8, width / 8)``."""
    def advance(_pipeline, step, _timestep, tensors):
        step_done(step + 1)
        return tensors

    # Drawn on the CPU, so that a seed means the same noise on every device; one each, so that an image does not
    # depend on those beside it.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipeline(image=list(images) or None, prompt_embeds=embeddings, width=width, height=height,
                    num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="latent",
                    callback_on_step_end=advance).images


def decode(vae: torch.nn.Module, processor: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Latents ``(N, C, H, W)`` -> N images."""
    # One at a time: for each image, the VAE takes more memory than anything else.
    return [image for latent in latents.to(vae.dtype).split(1) for image in processor.postprocess(
        vae.decode(latent, return_dict=False)[0].float(), output_type="pil")]


def _encode(repository: Repository, prompts: Sequence[str], compute: Compute, stages: Stages) -> torch.Tensor:
    with stages.run("load text encoder") as advance:
        pipeline = text_pipeline(repository, compute, advance)
    with stages.run("encode prompt"):
        return encode(pipeline, prompts, compute)


def _load(repository: Repository, transformer: Path | None, dense: Path | None, text_width: int, compute: Compute,
          stages: Stages) -> tuple[Flux2KleinPipeline, dict[str, Any]]:
    """The image pipeline, and what the settings say about its diffusion model."""
    with stages.run("load diffusion model") as advance:
        if dense is not None:
            module = models.dense_transformer(dense, compute.device, compute.dtype)
            facts = {"variant": "dense", "format": "dense", "source": dense.name, "packed_bytes": 0}
        else:
            loaded = load_transformer(transformer or repository.transformer, advance)
            if loaded.config.text_width != text_width:
                raise ModelFileError(
                    loaded.path, f"a model for text {text_width} wide, as the text encoder's",
                    f"one for {loaded.config.text_width}", "choose a model and a text encoder of one family")
            packed = sum(packed_nbytes(tensor) for tensor in loaded.tensors.values() if is_packed(tensor))
            facts = {"variant": loaded.variant, "format": loaded.format, "source": loaded.source,
                     "packed_bytes": packed}
            module = models.transformer_module(loaded, *compute)
            del loaded
    with stages.run("load VAE"):
        return image_pipeline(repository, module, compute), facts


@torch.inference_mode()
def generate(
    checkpoint: Path,
    prompts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    setting: backends.Setting = backends.AUTO,
    width: int = 1024,
    height: int = 1024,
    steps: int = 4,
    seed: int = 0,
    progress: bool = True,
    images: Sequence[Image.Image] = (),
    transformer: Path | None = None,
    dense: Path | None = None,
) -> Result:
    """An image for each of ``prompts`` by the repository folder ``checkpoint``, all from the noise of one ``seed``.

    ``images`` are the references of an edit. ``transformer``, a file or folder, replaces the diffusion model of the
    checkpoint; so does ``dense``, a folder of diffusers' with ordinary weights, for comparison. Raises ModelFileError
    on an unusable file, ValueError on a size that is not a multiple of 16 or on fewer than one step.
    """
    check_settings(width, height, steps)
    if transformer is not None:
        tensor_files(transformer)  # fail on a wrong path before the prompt is encoded
    repository = complete_repository(checkpoint)
    compute, stages = Compute(device, dtype, setting), Stages(device, progress)
    served = backends.resolve(setting, device, dtype).backend
    settings = {"prompt": prompts[0] if len(prompts) == 1 else list(prompts), "width": width, "height": height,
                "steps": steps, "seed": seed, "dtype": str(dtype).removeprefix("torch."), "device": str(device),
                "backend": served}
    embeddings = _encode(repository, prompts, compute, stages)
    if served == "mlx":
        mlx_backend.clear_cache()
    pipeline, facts = _load(repository, transformer, dense, embeddings.shape[-1], compute, stages)
    with stages.run("denoise", steps) as advance:
        latents = denoise(pipeline, embeddings, [seed] * len(prompts), width, height, steps, images,
                          lambda done: advance(done, steps))
    pipeline.transformer = None  # makes room for decoding
    if served == "mlx":
        mlx_backend.clear_cache()
    with stages.run("decode image"):
        pictures = decode(pipeline.vae, pipeline.image_processor, latents)
    return Result(pictures, settings | facts, stages.figures)
