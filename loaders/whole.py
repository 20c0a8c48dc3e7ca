"""A whole repository as one checkpoint file, written whole or not at all.

The names are those that ComfyUI's Save Checkpoint gives, with what ``formats/comfy.py`` stores for each packed weight;
the VAE has diffusers' names, and its ``config.json`` is the metadata ``bonsai.vae``. The files of the tokenizer, which
ComfyUI does not need, are uint8 tensors called ``bonsai.tokenizer.`` and the name.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .description import variant
from .files import SAFETENSORS_SUFFIXES, Progress, no_progress
from .formats import comfy
from .formats.interface import About
from .models import Model, difference, load_text_encoder, load_transformer, load_vae, save
from .names import PREFIXES, to_comfyui
from .opening import open_tensors
from .repository import TOKENIZER, TOKENIZER_FILES, Repository

_LOADERS: Mapping[str, Callable[..., Model]] = {
    "transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_vae}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer at ``path``, a folder or a checkpoint, by name."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    stored = open_tensors(path).tensors
    return {name: stored[TOKENIZER + name].flatten().view(torch.uint8).numpy().tobytes() for name in TOKENIZER_FILES
            if TOKENIZER + name in stored}


def save_checkpoint(repository: Repository, path: Path, progress: Progress = no_progress) -> None:
    """Write every part of ``repository`` into the one safetensors file ``path``. Raises ModelFileError.

    Weights go from file to file as they are; those of MLX and of our own files are never in memory as a whole.
    """
    repository.require("text_encoder", "tokenizer", "vae")
    transformer = load_transformer(repository.require("transformer"))
    vae = load_vae(repository.require("vae"))
    named = {"transformer": to_comfyui(transformer.tensors), "vae": vae.tensors,
             "text_encoder": load_text_encoder(repository.require("text_encoder")).tensors}

    def write(written: Path) -> None:
        tensors = {PREFIXES[part][0] + name: tensor for part, found in named.items()
                   for name, tensor in comfy.encode(found).items()}
        tensors |= {TOKENIZER + name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    for name, content in tokenizer_files(repository.require("tokenizer")).items()}
        about = comfy.metadata(About(variant(transformer.tensors, True), transformer.source))
        save_file(tensors, written, about | {"bonsai.vae": json.dumps(vae.config)})

    def verify(written: Path) -> str | None:
        found = ((part, difference(named[part], load(written).tensors)) for part, load in _LOADERS.items())
        return next((f"{name} of the {part}" for part, name in found if name), None)

    save(transformer.path, path, "checkpoint", SAFETENSORS_SUFFIXES, write, verify)
