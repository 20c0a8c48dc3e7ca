"""The architecture of the text encoder: Qwen3 (4B in the release), its dimensions read off the tensors."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .check import check_tensors
from .errors import ModelFileError

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
        raise ModelFileError(path, "one tensor of a name", "some twice, with and without the prefix",
                             "choose an unmodified file")
    return {name: tensor for name, tensor in named.items() if not name.startswith("lm_head")}


def check_qwen3(path: Path, tensors: Mapping[str, torch.Tensor], config_json: Mapping[str, Any]) -> Qwen3Config:
    """Read the dimensions off ``tensors`` and check that they are one complete, finite Qwen3 encoder.

    Raises ModelFileError on a missing, surplus, misshapen or non-finite tensor, on too few layers, and where
    ``config.json`` contradicts.
    """
    names = [f"model.{name}.weight" for name in ("embed_tokens", "layers.0.self_attn.q_proj",
             "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj", "layers.0.self_attn.q_norm")]
    ends = [tensors.get(name) for name in names]
    unusable = [name for name, end in zip(names, ends, strict=True)
                if end is None or end.ndim != (1 if name.endswith("_norm.weight") else 2)]
    if unusable:
        raise ModelFileError(path, "the tensors of a Qwen3 text encoder", f"no usable {unusable[0]}",
                             "choose a Bonsai text encoder")
    (vocab, hidden), (q, _), (kv, _), (mlp, _), (head_dim,) = (tuple(end.shape) for end in ends)
    layers = len({int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d{1,4})\.", name))})
    config = Qwen3Config(vocab, hidden, layers, q // head_dim, kv // head_dim, head_dim, mlp)
    check_tensors(path, tensors, qwen3_shapes(config))
    if config.heads % config.kv_heads:
        raise ModelFileError(path, "query heads in whole groups per key-value head",
                             f"{config.heads} on {config.kv_heads}", "choose a Bonsai text encoder")
    if layers <= max(TAPPED_LAYERS):
        raise ModelFileError(path, f"more than {max(TAPPED_LAYERS)} layers, the last one FLUX.2 Klein reads",
                             str(layers), "choose a Bonsai text encoder")
    for key, value in config.transformers().items():
        stated = config_json.get(key)
        if key not in ("max_position_embeddings", "tie_word_embeddings") and stated not in (None, value):
            raise ModelFileError(path, f"{key} {value} of this encoder", f"{reprlib.repr(stated)} in config.json",
                                 "download the whole folder again")
    return config
