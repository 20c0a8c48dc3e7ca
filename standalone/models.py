"""Modules of diffusers and transformers with packed weights."""

from __future__ import annotations

import inspect
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


def _fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype,
          setting: Setting = AUTO) -> torch.nn.Module:
    """Fill ``module``, built on the meta device: packed weights as they are, all others in ``dtype``."""
    for name, tensor in tensors.items():
        if is_packed(tensor):
            layer = name.removesuffix(".weight")
            dense = module.get_submodule(layer)
            n, k = tensor.shape
            packed = PackedEmbedding(n, k) if isinstance(dense, torch.nn.Embedding) else PackedLinear(k, n, bias=False)
            packed.setting = setting
            module.set_submodule(layer, packed)
    # On a packed weight ``to`` changes only the dtype that it presents, not its scales.
    cast = {name: tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    module.load_state_dict(cast, assign=True)
    return module.eval().requires_grad_(False)


def transformer_module(model: Transformer, device: torch.device, dtype: torch.dtype,
                       setting: Setting = AUTO) -> Flux2Transformer2DModel | MlxTransformer:
    """diffusers' FLUX.2 transformer with the weights of ``model``, computing in ``dtype``; in MLX where it is used."""
    packed = [parts(tensor) for tensor in model.tensors.values() if is_packed(tensor)]
    if packed and all(multiplies("mlx", setting, device, weight, dtype) for weight in packed):
        return MlxTransformer(model, device, dtype)
    with init_empty_weights():
        module = Flux2Transformer2DModel(**model.config.diffusers())
    return _fill(module, to_diffusers(model.tensors), dtype, setting).to(device)


def text_encoder_module(model: TextEncoder, device: torch.device, dtype: torch.dtype,
                        setting: Setting = AUTO) -> Qwen3Model:
    """transformers' Qwen3 with the weights of ``model``, without the layers after the last one that is read."""
    config = Qwen3Config(**model.config.transformers() | {"num_hidden_layers": max(TAPPED_LAYERS) + 1})
    with init_empty_weights():
        module = Qwen3Model(config)
    tensors = {name: model.tensors[f"model.{name}"] for name in module.state_dict()}
    return _fill(module, tensors, dtype, setting).to(device)


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
        module = _fill(module, loaded.tensors, dtype)
    except RuntimeError as error:
        # The first line only names the class.
        raise ModelFileError(path, "the tensors that config.json describes", str(error).splitlines()[-1].strip(),
                             "download the folder again") from error
    return module.to(device)


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
