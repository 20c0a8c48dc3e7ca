"""A random model: a whole repository in the published layout, a few million random weights.

It exercises every stage on any machine in seconds. What it draws is noise.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bonsai_image.loaders.formats import mlx
from bonsai_image.loaders.klein import KleinConfig, diffusers_shapes, is_packable
from bonsai_image.loaders.qwen3 import Qwen3Config, qwen3_shapes
from bonsai_image.ops.packed import pack_codes, packed_weight

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_TEXT = Qwen3Config(vocab_size=512, hidden_size=128, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
                    head_dim=64, intermediate_size=256)
_KLEIN = KleinConfig(num_attention_heads=2, joint_attention_dim=3 * _TEXT.hidden_size, num_layers=1,
                     num_single_layers=2)
_VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "latent_channels": 32, "norm_num_groups": 16,
        "sample_size": 256}


def random_transformer(config: KleinConfig, bits: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Diffusers-named canonical tensors of a random ternary (2 bits) or binary (1 bit) model, scaled to be stable."""
    result = {}
    for name, shape in diffusers_shapes(config).items():
        if is_packable(name):
            levels = torch.randint(0, 3 if bits == 2 else 2, shape, generator=generator, dtype=torch.uint8)
            scale = torch.rand(shape[0], shape[1] // 128, generator=generator).add(0.5).mul(shape[1] ** -0.5)
            result[name] = packed_weight(pack_codes(levels, bits), scale.bfloat16(), bits)
        elif len(shape) == 1:
            result[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            result[name] = torch.randn(shape, generator=generator).mul(shape[1] ** -0.5).bfloat16()
    return result


def random_text_encoder(config: Qwen3Config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Canonical tensors of a random 4-bit encoder in groups of 64, its embedding packed as well."""
    result = {}
    for name, shape in qwen3_shapes(config).items():
        if len(shape) == 1:
            result[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8)
        scale = torch.full((shape[0], shape[1] // 64), shape[1] ** -0.5 / 4, dtype=torch.bfloat16)
        result[name] = packed_weight(codes, scale, 4, "affine", -7.5 * scale)
    return result


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the chat template of Qwen3 (thinking off) in Hugging Face's layout."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_SPECIAL_TOKENS[0], eos_token=_SPECIAL_TOKENS[2],
                                   chat_template=_CHAT_TEMPLATE, model_max_length=131072)
    fast.save_pretrained(folder)


def write_repository(folder: Path, bits: int = 2, seed: int = 0, klein: KleinConfig = _KLEIN,
                    text: Qwen3Config = _TEXT, vae: Mapping[str, object] = _VAE) -> Path:
    """Write a random repository in the layout of the MLX releases to ``folder`` and return it."""
    generator = torch.Generator().manual_seed(seed)
    transformer = folder / "transformer-packed-mflux"
    encoder = folder / "text_encoder-mlx-4bit"
    for path in (transformer, encoder):
        path.mkdir(parents=True)
    save_file(mlx.encode(random_transformer(klein, bits, generator)),
              transformer / "diffusion_pytorch_model.safetensors", {"format": "mlx"})
    (transformer / "config.json").write_text(json.dumps(klein.diffusers()), encoding="utf-8")
    (transformer / "quantization_config.json").write_text(json.dumps({"bits": bits, "group_size": 128}),
                                                          encoding="utf-8")
    save_file(mlx.encode(random_text_encoder(text, generator)), encoder / "model.safetensors", {"format": "mlx"})
    (encoder / "config.json").write_text(json.dumps({**text.transformers(),
                                                     "quantization": {"bits": 4, "group_size": 64}}), encoding="utf-8")
    write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKLFlux2(**vae).bfloat16().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}), encoding="utf-8")
    return folder
