"""The architecture of the text encoder: Qwen3 (4B in the release), its dimensions read off the tensors."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .check import Shapes, check_json, check_tensors, count_numbered, read_shapes
from .errors import CHOOSE_TEXT_ENCODER, CHOOSE_UNMODIFIED, ModelFileError
from .files import TensorFile

#: FLUX.2 Klein reads the hidden states after these layers, as they are before the final norm.
TAPPED_LAYERS = (9, 18, 27)
#: What no tensor shows, and what makes no difference to the hidden states.
_FIXED = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_FREE = {"max_position_embeddings": 40960, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Qwen3Config:
    """Dimensions of a Qwen3 decoder, as transformers' ``config.json`` calls them; by default those of Qwen3-4B."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728

    def transformers(self) -> dict[str, Any]:
        """The arguments of ``transformers.Qwen3Config``."""
        return {**asdict(self), **_FIXED, **_FREE}


def is_read(name: str) -> bool:
    """Whether FLUX.2 Klein needs the tensor or module ``name``: neither a layer after the last tapped one, nor the
    final norm."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(layer[1]) < max(TAPPED_LAYERS) if layer else not re.match(r"(model\.)?norm\b", name)


def qwen3_shapes(config: Qwen3Config) -> Shapes:
    """The shape of every tensor, by its Hugging Face name."""
    h, mlp = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes: Shapes = {"embed_tokens": (config.vocab_size, h), "norm": (h,)}
    layer = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,), "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (mlp, h), "mlp.up_proj": (mlp, h), "mlp.down_proj": (h, mlp),
        "input_layernorm": (h,), "post_attention_layernorm": (h,),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
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


def read_config(path: Path, tensors: Mapping[str, torch.Tensor]) -> Qwen3Config:
    """The dimensions of the Qwen3 decoder in ``tensors``, read off rows and norms, so that packed weights may be in any
    format. Raises ModelFileError."""
    hidden, head_dim, vocab, q, kv, mlp = (shape[0] for shape in read_shapes(path, tensors, {
        "model.layers.0.input_layernorm.weight": 1, "model.layers.0.self_attn.q_norm.weight": 1,
        "model.embed_tokens.weight": 2, "model.layers.0.self_attn.q_proj.weight": 2,
        "model.layers.0.self_attn.k_proj.weight": 2,
        "model.layers.0.mlp.gate_proj.weight": 2}, "a Qwen3 text encoder", CHOOSE_TEXT_ENCODER))
    layers = count_numbered(tensors, r"model\.layers\.(\d{1,4})\.")
    heads, kv_heads = q // head_dim, kv // head_dim
    if not kv_heads or heads % kv_heads:
        raise ModelFileError(path, "query heads in whole groups per key-value head", f"{heads} on {kv_heads}",
                             CHOOSE_TEXT_ENCODER)
    if layers < max(TAPPED_LAYERS):
        raise ModelFileError(path, f"at least {max(TAPPED_LAYERS)} layers, the last one FLUX.2 Klein reads",
                             str(layers), CHOOSE_TEXT_ENCODER)
    return Qwen3Config(vocab, hidden, layers, heads, kv_heads, head_dim, mlp)


def check_qwen3(file: TensorFile, tensors: Mapping[str, torch.Tensor], whole: bool) -> Qwen3Config:
    """Check that ``tensors``, decoded from ``file``, are one complete, finite Qwen3 encoder, or (not ``whole``) all of
    it that :func:`is_read`; its dimensions.

    Raises ModelFileError on a missing, surplus, misshapen or non-finite tensor, on too few layers, and where
    ``config.json`` describes another model.
    """
    config = read_config(file.path, tensors)
    shapes = qwen3_shapes(config)
    known = {key: value for key, value in config.transformers().items() if key not in _FREE}
    if not whole:
        shapes = {name: shape for name, shape in shapes.items() if is_read(name)}
        del known["num_hidden_layers"]
    check_tensors(file, tensors, shapes)
    check_json(file, file.config, known, _FIXED)
    return config
