"""Text (and reference images) to images through diffusers' ``Flux2KleinPipeline``, one stage at a time so that each
part's memory is freed when its stage returns."""

import argparse
import functools
import gc
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from .. import loaders
from ..disk import write_whole
from ..loaders import Lora, ModelFileError, Repository, Transformer
from ..loaders.description import count
from ..loaders.files import Progress, no_progress, refuse_changed
from ..loaders.opening import tensor_files
from ..ops import backends
from ..ops.backends.mlx import backend as mlx_backend
from ..ops.devices import DTYPES, default_dtype
from . import lora, models
from .references import check_size


class Compute(NamedTuple):
    """Where and how a model runs: its device, the dtype of its activations, and what multiplies its packed
    weights."""

    device: torch.device
    dtype: torch.dtype
    setting: backends.Setting = backends.EXACT


def device_named(name: str | None) -> torch.device:
    """The device of an option ``--device``, by default the fastest. Raises ValueError for one that cannot be used."""
    # Without the check, PyTorch built for CUDA answers cuda on a machine without a GPU.
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name is None:
        return best
    # PyTorch raises a different exception for each reason why a device is unavailable.
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not available in this PyTorch; omit it to use {best}.") from error
    return torch.device(name)


def compute_of(args: argparse.Namespace) -> Compute:
    """What the options of a command that makes images say. Raises ValueError as :func:`device_named` does."""
    device = device_named(args.device)
    return Compute(device, DTYPES.get(args.dtype) or default_dtype(device),
                   backends.Setting(args.backend, args.precision))


#: Stage -> its seconds, and the megabytes in use at its end: of the process, or on CUDA the peak of the device.
Figures = dict[str, dict[str, float]]


class Result(NamedTuple):
    """An image for each prompt, with what they took."""

    images: list[Image.Image]
    settings: dict[str, Any]
    stages: Figures


def png(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """A PNG whose ``bonsai`` text chunk holds ``settings`` as JSON."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("bonsai", json.dumps(settings))
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def save_png(image: Image.Image, settings: dict[str, Any], path: Path) -> None:
    """Write :func:`png` to a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png(image, settings))


@contextmanager
def _stage(figures: Figures, device: torch.device, progress: bool, name: str) -> Iterator[Progress]:
    """One stage, with a progress bar: yields what moves the bar, and adds to ``figures``."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    mlx_backend.clear_cache()
    start = time.perf_counter()
    with tqdm(total=1, desc=f"{name:20}", disable=not progress, bar_format="{desc}{bar:24} {elapsed}") as bar:
        yield lambda done, total: bar.update(done / (total or 1) - bar.n)
        if cuda:
            torch.cuda.synchronize(device)
        bar.update(1 - bar.n)
    used = torch.cuda.max_memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    figures[name] = {"seconds": time.perf_counter() - start, "megabytes": used / 1e6}


def check_settings(width: int, height: int, steps: int, seed: int, *prompts: str) -> None:
    """Raises ValueError on a size that is not a multiple of 16, on fewer than one step, on a seed out of range, on a
    prompt with an embedding or what is no text."""
    if min(width, height) < 16 or width % 16 or height % 16:
        raise ValueError(f"width and height must be positive multiples of 16, got {width} x {height}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"a seed must be between 0 and 2**63 - 1, got {seed}")
    for prompt in prompts:
        if re.search("[\ud800-\udfff]", prompt):  # bytes of a command line that are not in its encoding
            raise ValueError(f"the prompt {prompt[:80]!r} is not valid text; give it in UTF-8")
        if found := re.search(r"(?:^|\s)(embedding:\S*)", prompt):
            raise ValueError(f"{found[1]} is a file that only ComfyUI reads; remove it from the prompt")


def complete_repository(folder: Path, transformer: Path | None = None, vae: Path | None = None) -> Repository:
    """A folder with all that an image needs. ``transformer`` and ``vae``, each a file or folder, replace its own.

    Raises ModelFileError where a part is missing.
    """
    repository = loaders.find_repository(folder)
    repository.require("text_encoder", "tokenizer", "vae")
    for part, path in (("transformer", transformer), ("vae", vae)):
        if path is not None:
            tensor_files(path)  # fails on a wrong path before a prompt is encoded
            setattr(repository, part, path)
    return repository


def text_pipeline(repository: Repository, compute: Compute, progress: Progress = no_progress) -> Flux2KleinPipeline:
    """A pipeline with the text encoder and the tokenizer alone."""
    model = loaders.load_text_encoder(repository.text_encoder, progress, whole=False)
    encoder = models.text_encoder_module(model, *compute)
    return Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=None, text_encoder=encoder,
                              tokenizer=models.tokenizer(repository.tokenizer), transformer=None)


def encode(pipeline: Flux2KleinPipeline, prompts: Sequence[str], compute: Compute) -> torch.Tensor:
    """Prompts -> embeddings ``(prompts, tokens, channels)`` in ``compute.dtype``, equal to ComfyUI's."""
    # ComfyUI's tokenizer unescapes brackets, although a prompt for Klein has no weights.
    prompts = [prompt.replace("\\(", "(").replace("\\)", ")") for prompt in prompts]
    texts = pipeline.tokenizer.apply_chat_template([[{"role": "user", "content": prompt}] for prompt in prompts],
                                                   tokenize=False, add_generation_prompt=True, enable_thinking=False)
    # Padded to FLUX.2 Klein's 512 tokens, or to what a smaller model's tokenizer states, and never truncated.
    length = max(min(512, pipeline.tokenizer.model_max_length), *map(len, pipeline.tokenizer(texts)["input_ids"]))
    return pipeline.encode_prompt(prompts, device=compute.device, max_sequence_length=length)[0].to(compute.dtype)


def image_pipeline(repository: Repository, transformer: torch.nn.Module, compute: Compute) -> Flux2KleinPipeline:
    """A pipeline with ``transformer`` and the repository's VAE, without a text encoder."""
    vae = models.vae_module(repository.vae, compute.device, compute.dtype)
    pipeline = Flux2KleinPipeline(scheduler=models.scheduler(repository.scheduler), vae=vae, text_encoder=None,
                                  tokenizer=None, transformer=transformer, is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoise(pipeline: Flux2KleinPipeline, embeddings: torch.Tensor, seeds: Sequence[int], width: int, height: int,
            steps: int, images: Sequence[Image.Image] = (), progress: Progress = no_progress) -> torch.Tensor:
    """Embeddings ``(N, tokens, channels)`` and as many seeds -> latents ``(N, C, height / 8, width / 8)``."""
    def advance(_pipeline, step, _timestep, tensors):
        progress(step + 1, steps)
        return tensors

    # Drawn on the CPU, so that a seed means the same noise on every device; one generator each, so that an image
    # does not depend on those beside it.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipeline(image=list(images) or None, prompt_embeds=embeddings, width=width, height=height,
                    num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="latent",
                    callback_on_step_end=advance).images


def decode(vae: torch.nn.Module, processor: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Latents ``(N, C, H, W)`` -> N images."""
    # One at a time: per image, the VAE needs more memory than anything else.
    return [image for latent in latents.to(vae.dtype).split(1) for image in processor.postprocess(
        vae.decode(latent, return_dict=False)[0].float(), output_type="pil")]


@torch.inference_mode()
def generate(repository: Repository, prompts: Sequence[str], compute: Compute, width: int = 1024, height: int = 1024,
             steps: int = 4, seed: int = 0, images: Sequence[Image.Image] = (), model: Transformer | None = None,
             progress: bool = True, loras: Sequence[tuple[Lora, float]] = ()) -> Result:
    """An image for each of ``prompts`` by a complete ``repository``, all from the noise of one ``seed``.

    ``images`` are the references of an edit. ``model`` replaces the diffusion model of the repository. Raises
    ModelFileError on an unusable file, ValueError as :func:`check_settings` does.
    """
    check_settings(width, height, steps, seed, *prompts)
    for image in images:
        check_size(image)
    settings = {"prompt": prompts[0] if len(prompts) == 1 else list(prompts), "width": width, "height": height,
                "steps": steps, "seed": seed, "dtype": str(compute.dtype).removeprefix("torch."),
                "device": str(compute.device)}
    if loras:
        settings["loras"] = [[each.path.name, strength] for each, strength in loras]
    figures: Figures = {}
    stage = functools.partial(_stage, figures, compute.device, progress)
    with stage("load text encoder") as advance:
        pipeline = text_pipeline(repository, compute, advance)
    with stage("encode prompt"):
        embeddings = encode(pipeline, prompts, compute)
    del pipeline  # makes room for the diffusion model
    with stage("load diffusion model") as advance:
        model = model or loaders.load_transformer(repository.transformer, advance)
        refuse_changed(model.stamps)
        if (text_width := model.config.joint_attention_dim) != embeddings.shape[-1]:
            raise ModelFileError(model.path, f"a model for text {embeddings.shape[-1]} wide, as the text encoder's",
                                 f"one for {text_width}", "choose a model and a text encoder that fit")
        settings |= {"variant": model.variant, "format": model.format, "source": model.source,
                     "packed_bytes": count(model.tensors).packed_bytes}
        transformer = models.transformer_module(model, *compute, layers=bool(loras))
        del model
        hooks = lora.hooks(transformer, loras) if loras else []
    with stage("load VAE"):
        pipeline = image_pipeline(repository, transformer, compute)
    with stage("denoise") as advance, lora.applied(hooks):
        latents = denoise(pipeline, embeddings, [seed] * len(prompts), width, height, steps, images, advance)
    # After the last step, when it is settled what multiplies.
    found = backends.choices(compute.setting, compute.device, transformer.parameters(), compute.dtype)
    names = sorted({str(choice) for *_, choice in found}) or [getattr(transformer, "backend", "torch")]
    settings["backend"] = ", ".join(names)
    pipeline.transformer = transformer = hooks = None
    gc.collect()  # makes room for decoding
    with stage("decode image"):
        drawn = decode(pipeline.vae, pipeline.image_processor, latents)
    return Result(drawn, settings, figures)
