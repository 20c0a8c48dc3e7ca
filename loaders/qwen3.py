"""The architecture of the text encoder: Qwen3 (4B in the release), its dimensions read off the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .check import check_config, check_tensors
from .errors import CHOOSE_TEXT_ENCODER, CHOOSE_UNMODIFIED, ModelFileError
from .files import TensorFile

#: FLUX.2 Klein reads the hidden states after these layers, so the encoder needs at least 27, plus one so that the
#: final norm of the library models does not fall on the last of them.
TAPPED_LAYERS = (9, 18, 27)


@dataclass(frozen=True)
class Qwen3Config:
    """Dimensions of a Qwen3 decoder. The 4B release: 2560 wide, 36 layers, 32 heads on 8 key-value heads of 128."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def transformers(self) -> dict[str, Any]:
        """The arguments of ``transformers.Qwen3Config``."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        }


def qwen3_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by its Hugging Face name."""
    h, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab, h), "norm": (h,)}
    for i in range(config.layers):
        shapes |= {
            f"layers.{i}.self_attn.q_proj": (q, h),
            f"layers.{i}.self_attn.k_proj": (kv, h),
            f"layers.{i}.self_attn.v_proj": (kv, h),
            f"layers.{i}.self_attn.o_proj": (h, q),
            f"layers.{i}.self_attn.q_norm": (config.head_dim,),
            f"layers.{i}.self_attn.k_norm": (config.head_dim,),
            f"layers.{i}.mlp.gate_proj": (config.mlp, h),
            f"layers.{i}.mlp.up_proj": (config.mlp, h),
            f"layers.{i}.mlp.down_proj": (h, config.mlp),
            f"layers.{i}.input_layernorm": (h,),
            f"layers.{i}.post_attention_layernorm": (h,),
        }
    return {f"model.{name}.weight": shape for name, shape in shapes.items()}


def is_qwen3(names: Mapping[str, object]) -> bool:
    """Whether these tensor or module names are those of a Qwen3 decoder (its query norms set it apart)."""
    return any(re.match(r"(model\.)?layers\.0\.self_attn\.q_norm\b", name) for name in names)


def normalise(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names with the ``model.`` prefix, without the language-model head: encoding never uses it.

    Raises ModelFileError where the prefix makes two tensors one.
    """
    named = {name if name.startswith(("model.", "lm_head")) else f"model.{name}": t for name, t in tensors.items()}
    if len(named) < len(tensors):
        raise ModelFileError(path, "each tensor once", "duplicates after adding the prefix model.", CHOOSE_UNMODIFIED)
    return {name: tensor for name, tensor in named.items() if not name.startswith("lm_head")}


def shapes(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model in ``tensors``. Raises ModelFileError."""
    return qwen3_shapes(read_config(path, tensors))


def read_config(path: Path, tensors: Mapping[str, torch.Tensor]) -> Qwen3Config:
    """The dimensions of the Qwen3 decoder in ``tensors``, read off rows and norms, so that packed weights may be in any
    format. Raises ModelFileError."""
    rows = {}
    for name, dimensions in (("norm", 1), ("layers.0.self_attn.q_norm", 1), ("embed_tokens", 2),
                             ("layers.0.self_attn.q_proj", 2), ("layers.0.self_attn.k_proj", 2),
                             ("layers.0.mlp.gate_proj", 2)):
        tensor = tensors.get(f"model.{name}.weight")
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != dimensions:
            raise ModelFileError(path, "the tensors of a Qwen3 text encoder", f"no usable model.{name}.weight",
                                 CHOOSE_TEXT_ENCODER)
        rows[name.split(".")[-1]] = tensor.shape[0]
    layers = len({int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d{1,4})\.", name))})
    head_dim = rows["q_norm"]
    config = Qwen3Config(rows["embed_tokens"], rows["norm"], layers, rows["q_proj"] // head_dim,
                         rows["k_proj"] // head_dim, head_dim, rows["gate_proj"])
    if not config.kv_heads or config.heads % config.kv_heads:
        raise ModelFileError(path, "query heads in whole groups per key-value head",
                             f"{config.heads} on {config.kv_heads}", CHOOSE_TEXT_ENCODER)
    if layers <= max(TAPPED_LAYERS):
        raise ModelFileError(path, f"more than {max(TAPPED_LAYERS)} layers, the last one FLUX.2 Klein reads",
                             str(layers), CHOOSE_TEXT_ENCODER)
    return config


def check_qwen3(file: TensorFile, tensors: Mapping[str, torch.Tensor]) -> Qwen3Config:
    """Check that ``tensors``, decoded from ``file``, are one complete, finite Qwen3 encoder; its dimensions.

    Raises ModelFileError on a missing, surplus, misshapen or non-finite tensor, on too few layers, and where
    ``config.json`` describes another model.
    """
    config = read_config(file.path, tensors)
    check_tensors(file, tensors, qwen3_shapes(config))
    known = {key: value for key, value in config.transformers().items()
             if key not in ("max_position_embeddings", "tie_word_embeddings")}
    check_config(file, known, fixed=("rms_norm_eps", "rope_theta"))
    return config
