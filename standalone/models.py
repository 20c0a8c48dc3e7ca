"""Modules of diffusers and transformers with packed weights."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from ..loaders import ModelFileError, TextEncoder, Transformer, load_vae
from ..loaders.names import to_diffusers
from ..loaders.qwen3 import TAPPED_LAYERS
from ..ops.backends import AUTO, Setting, multiplies
from ..ops.layers import PackedEmbedding, PackedLinear
from ..ops.packed import is_packed, parts
from .mlx_transformer import MlxTransformer

#: The scheduler of FLUX.2 Klein, for repositories without a scheduler folder.
_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
              "time_shift_type": "exponential", "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
              "max_image_seq_len": 4096}


def _fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device,
          dtype: torch.dtype, setting: Setting) -> torch.nn.Module:
    """Fill ``module``, built on the meta device: packed weights as they are, all others in ``dtype``."""
    for name, tensor in tensors.items():
        if is_packed(tensor):
            layer = name.removesuffix(".weight")
            dense = module.get_submodule(layer)
            n, k = tensor.shape
            packed = PackedEmbedding(n, k) if isinstance(dense, torch.nn.Embedding) else PackedLinear(k, n, bias=False)
            packed.setting = setting
            module.set_submodule(layer, packed)
    _assign(module, tensors, dtype)
    return _ready(module, device)


def _assign(module: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    # On a packed weight ``to`` changes only the dtype that it presents, not its scales.
    cast = {name: tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    module.load_state_dict(cast, assign=True, strict=True)


def _ready(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    return module.to(device=device).eval().requires_grad_(False)


def transformer_module(model: Transformer, device: torch.device, dtype: torch.dtype,
                       setting: Setting = AUTO) -> Flux2Transformer2DModel | MlxTransformer:
    """diffusers' FLUX.2 transformer with the weights of ``model``, computing in ``dtype``; in MLX where it is used."""
    packed = [parts(tensor) for tensor in model.tensors.values() if is_packed(tensor)]
    if packed and all(multiplies("mlx", setting, device, weight, dtype) for weight in packed):
        return MlxTransformer(model, device, dtype)
    with init_empty_weights():
        module = Flux2Transformer2DModel(**model.config.diffusers())
    return _fill(module, to_diffusers(model.tensors), device, dtype, setting)


def dense_transformer(path: Path, device: torch.device, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """diffusers' FLUX.2 transformer with ordinary weights, from a folder in diffusers' layout."""
    module = Flux2Transformer2DModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    return _ready(module, device)


def text_encoder_module(model: TextEncoder, device: torch.device, dtype: torch.dtype,
                        setting: Setting = AUTO) -> Qwen3Model:
    """transformers' Qwen3 with the weights of ``model``, without the layers after the last one that is read."""
    kept = max(TAPPED_LAYERS) + 1
    with init_empty_weights():
        config = Qwen3Config(**{**model.config.transformers(), "num_hidden_layers": kept})
        module = Qwen3Model(config)
    tensors = {name.removeprefix("model."): tensor for name, tensor in model.tensors.items()
               if (layer := re.match(r"model\.layers\.(\d+)\.", name)) is None or int(layer[1]) < kept}
    return _fill(module, tensors, device, dtype, setting)


def vae_module(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """diffusers' FLUX.2 VAE from a ``vae`` folder with its ``config.json``. Raises ModelFileError."""
    loaded = load_vae(path)
    if not loaded.config:
        raise ModelFileError(path / "config.json", "the VAE's configuration", "no such file",
                             "download the folder again")
    # Published files hold keys that this class does not know, and would warn about in the middle of the progress bar.
    known = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    config = {key: value for key, value in loaded.config.items() if key in known}
    with init_empty_weights():
        module = AutoencoderKLFlux2.from_config(config)
    try:
        _assign(module, loaded.tensors, dtype)
    except RuntimeError as error:
        # The first line only names the class.
        raise ModelFileError(path, "the tensors that config.json describes", str(error).splitlines()[-1].strip(),
                             "download the folder again") from error
    return _ready(module, device)


def tokenizer(path: Path):
    """The tokenizer of a repository, from local files only. Code beside it never runs. Raises ModelFileError."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a plain Exception for a damaged file
        raise ModelFileError(path, "the tokenizer of Qwen3, which needs no code of its own", str(error),
                             "download the folder again") from error


def scheduler(path: Path | None) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in ``path``, or FLUX.2 Klein's for None. Raises ModelFileError."""
    if path is None:
        return FlowMatchEulerDiscreteScheduler.from_config(_SCHEDULER)
    try:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelFileError(path, "diffusers' scheduler_config.json", str(error),
                             "download the folder again") from error
