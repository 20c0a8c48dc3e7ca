"""A whole repository as one checkpoint file, or as a folder like PrismML's MLX repositories: whole or not at all.

In a checkpoint the names are those that ComfyUI's Save Checkpoint gives, with what ``formats/comfy.py`` stores for each
packed weight; the VAE has diffusers' names, and its ``config.json`` is the metadata ``bonsai.vae``. The files of the
tokenizer, which ComfyUI does not need, are uint8 tensors called ``bonsai.tokenizer.`` and the name.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..ops.packed import is_packed, unwrap
from .description import sha256, variant
from .files import SAFETENSORS_SUFFIXES, no_progress, read_json, write_json
from .formats import comfy, mlx
from .formats.interface import About
from .models import LOADERS, difference, load_text_encoder, load_transformer, load_vae, save
from .names import PREFIXES, to_comfyui
from .opening import open_tensors
from .repository import TOKENIZER, TOKENIZER_FILES, Repository, is_repository, parts_of

#: FLUX.2 Klein's ``scheduler_config.json``, for a source that has none.
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True,
              "time_shift_type": "exponential", "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
              "max_image_seq_len": 4096, "num_train_timesteps": 1000}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer at ``path``, a folder or a checkpoint, by name."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    stored = open_tensors(path).tensors
    return {name: stored[TOKENIZER + name].flatten().view(torch.uint8).numpy().tobytes() for name in TOKENIZER_FILES
            if TOKENIZER + name in stored}


def is_whole(path: Path) -> bool:
    """Whether ``path`` holds several parts: a repository, or a checkpoint."""
    return is_repository(path) or (path.is_file() and len(parts_of(open_tensors(path).tensors)) > 1)


class _Whole:
    """The parts of a repository, loaded. Weights of MLX and of our own files stay on disk until they are written."""

    def __init__(self, repository: Repository):
        repository.require("text_encoder", "tokenizer", "vae")
        self.transformer = load_transformer(repository.require("transformer"))
        self.text_encoder = load_text_encoder(repository.require("text_encoder"))
        self.vae = load_vae(repository.require("vae"))
        self.tokenizer = tokenizer_files(repository.require("tokenizer"))
        scheduler = repository.scheduler
        self.scheduler = read_json(scheduler / "scheduler_config.json") if scheduler else SCHEDULER
        self.about = About(variant(self.transformer.tensors, check_codes=True), self.transformer.source)
        #: By part, under ComfyUI's names.
        self.tensors = {"transformer": to_comfyui(self.transformer.tensors), "vae": self.vae.tensors,
                        "text_encoder": self.text_encoder.tensors}


def _write_checkpoint(path: Path, whole: _Whole) -> None:
    tensors = {PREFIXES[part][0] + name: tensor for part, found in whole.tensors.items()
               for name, tensor in comfy.encode(found).items()}
    tensors |= {TOKENIZER + name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
                for name, content in whole.tokenizer.items()}
    save_file(tensors, path, comfy.metadata(whole.about, whole.transformer.config) | {
        "bonsai.vae": json.dumps(whole.vae.config)})


def _write_mlx(path: Path, whole: _Whole) -> None:
    """A folder like PrismML's MLX repositories. Raises ValueError for a text encoder that is not affine in 4 bits."""
    packed = [unwrap(tensor) for tensor in whole.text_encoder.tensors.values() if is_packed(tensor)]
    if {each.bits for each in packed} != {4}:
        raise ValueError("a text encoder that is not packed in 4 bits")
    if "model.norm.weight" not in whole.text_encoder.tensors:
        raise ValueError("a text encoder without its last layers, as ComfyUI saves it")
    path.mkdir()
    mlx.write(path / "transformer-packed-mflux", whole.transformer.tensors, whole.transformer.config, whole.about)
    encoder, tokenizer = path / "text_encoder-mlx-4bit", path / "tokenizer"
    for folder in (encoder, tokenizer, path / "vae", path / "scheduler"):
        folder.mkdir()
    for folder in (encoder, tokenizer):
        for name, content in whole.tokenizer.items():
            (folder / name).write_bytes(content)
    save_file(mlx.encode(whole.text_encoder.tensors), encoder / "model.safetensors", {"format": "mlx"})
    group = next(unwrap(tensor).group for tensor in whole.transformer.tensors.values() if is_packed(tensor))
    packing = {"group_size": packed[0].group, "bits": packed[0].bits}
    write_json(encoder / "config.json", {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
        **whole.text_encoder.config.transformers(), "quantization": packing, "quantization_config": packing})
    save_file(whole.vae.tensors, path / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(path / "vae" / "config.json", {"_class_name": "AutoencoderKLFlux2"} | whole.vae.config)
    write_json(path / "scheduler" / "scheduler_config.json", whole.scheduler)
    write_json(path / "model_index.json", {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    write_json(path / "manifest.json", {"model_version": f"{whole.about.variant} g{group}", "files": [
        {"remote_path": file.relative_to(path).as_posix(), "size": file.stat().st_size,
         "sha256": sha256(file, no_progress)} for file in files]})


#: What ``convert --to`` makes of a whole repository: how it is written, and the endings of the one file.
TARGETS: dict[str, tuple[Callable[[Path, _Whole], None], tuple[str, ...]]] = {
    "checkpoint": (_write_checkpoint, SAFETENSORS_SUFFIXES), "mlx": (_write_mlx, ())}


def save_repository(repository: Repository, path: Path, target: str) -> None:
    """Write every part of ``repository`` to ``path`` as one of :data:`TARGETS`. Raises ModelFileError."""
    write, suffixes = TARGETS[target]
    whole = _Whole(repository)

    def verify(written: Path) -> str | None:
        for part, load in LOADERS.items():
            found = load(written).tensors
            if name := difference(whole.tensors[part], to_comfyui(found) if part == "transformer" else found):
                return f"{name} of the {part}"
        return None

    save(whole.transformer.path, path, target, suffixes, lambda written: write(written, whole), verify)
