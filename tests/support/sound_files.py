"""Small valid model files in every format, for the tests that damage copies of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import ModelFileError, load_text_encoder, load_transformer, load_vae
from bonsai_image.loaders.formats import comfy, dense, gemlite, mlx
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.loaders.qwen3 import Qwen3Config
from bonsai_image.ops.packed import is_packed, unpack_codes, unwrap
from bonsai_image.tests.support.random_model import random_text_encoder, random_transformer

KLEIN = KleinConfig(num_attention_heads=1, joint_attention_dim=384, in_channels=32, out_channels=32, num_layers=1,
                    num_single_layers=1)
TEXT = Qwen3Config(vocab_size=256, hidden_size=128, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
                   head_dim=64, intermediate_size=128)
VAE = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 16,
       "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"

#: Name -> its loader, its weight file, a dense matrix, and the stored codes, scale and shift of one packed layer.
TO_Q, QKV, UP = "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", "model.layers.3.mlp.up_proj"
FILES = {
    "mlx": (load_transformer, WEIGHTS, "x_embedder.weight", f"{TO_Q}.weight", f"{TO_Q}.scales", f"{TO_Q}.biases"),
    "gemlite": (load_transformer, "state_dict.pt", "x_embedder.weight", f"{TO_Q}.W_q", f"{TO_Q}.scales",
                f"{TO_Q}.zeros"),
    "comfy": (load_transformer, "bonsai.safetensors", "img_in.weight", f"{QKV}.weight", f"{QKV}.weight_scale", None),
    "base3": (load_transformer, "bonsai.safetensors", "img_in.weight", f"{QKV}.weight", f"{QKV}.weight_scale", None),
    "unpacked": (load_transformer, WEIGHTS, "x_embedder.weight", None, None, None),
    "sharded": (load_transformer, "a.safetensors", "x_embedder.weight", None, None, None),
    "single": (load_transformer, "klein.safetensors", "img_in.weight", None, None, None),
    "te-mlx": (load_text_encoder, "model.safetensors", "model.norm.weight", f"{UP}.weight", f"{UP}.scales",
               f"{UP}.biases"),
    "te-hqq": (load_text_encoder, "qmodel.pt", "model.norm|weight", f"{UP}|W_q", f"{UP}|scale", f"{UP}|zero"),
    "te-dense": (load_text_encoder, "model.safetensors", "model.norm.weight", None, None, None),
    "vae": (load_vae, WEIGHTS, "decoder.conv_in.weight", None, None, None),
}


def to_4bit_u8(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Canonical 4-bit codes, an even number of groups -> HQQ's 4bit_u8."""
    first, second = unpack_codes(codes, 4).view(-1, group).chunk(2)
    return (first << 4) | second


def hqq_entries(tensors: dict) -> dict:
    """The dict that hqq pickles, from affine 4-bit weights (their zero point is 7.5)."""
    result = {}
    for name, tensor in tensors.items():
        if not is_packed(tensor):
            result[name.removesuffix(".weight")] = {"weight": tensor.half()}
            continue
        scale = unwrap(tensor).scale.half().view(-1, 1)
        result[name.removesuffix(".weight")] = {
            "W_q": to_4bit_u8(unwrap(tensor).codes, 64), "scale": scale, "zero": torch.full_like(scale, 7.5),
            "nbits": 4, "group_size": 64, "shape": torch.Size(tensor.shape), "axis": 1, "packing": "4bit_u8",
            "compute_dtype": torch.float16, "quant_zero": False, "quant_scale": False, "view_as_float": False}
    return result


def write_all(root: Path) -> Path:
    """Write each of ``FILES`` to the folder of its name under ``root``, and return ``root``."""
    for name in FILES:
        (root / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    model, encoder = random_transformer(KLEIN, 2, generator), random_text_encoder(TEXT, generator)
    plain = {name: dense.expand(tensor) for name, tensor in model.items()}
    ours = to_comfyui(model)
    for name, tensors in (("mlx", mlx.encode(model)), ("comfy", comfy.encode(ours)), ("unpacked", plain),
                          ("base3", comfy.encode(ours, base3=True)), ("single", to_comfyui(plain)),
                          ("te-mlx", mlx.encode(encoder)),
                          ("te-dense", {name: torch.ones(tensor.shape) for name, tensor in encoder.items()})):
        save_file(tensors, root / name / FILES[name][1], {"format": "pt"})
    torch.save(gemlite.encode(model), root / "gemlite" / "state_dict.pt")
    torch.save(hqq_entries(encoder), root / "te-hqq" / "qmodel.pt")
    shards = {"a.safetensors": sorted(plain)[::2], "b.safetensors": sorted(plain)[1::2]}
    if "x_embedder.weight" not in shards["a.safetensors"]:
        shards = dict(zip(shards, reversed(shards.values()), strict=True))
    for file, names in shards.items():
        save_file({name: plain[name] for name in names}, root / "sharded" / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (root / "sharded" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("mlx", "gemlite", "unpacked", "sharded"):
        (root / name / "config.json").write_text(json.dumps(KLEIN.diffusers()))
    for name in ("mlx", "gemlite"):
        (root / name / "quantization_config.json").write_text(json.dumps({"bits": 2, "group_size": 128}))
    for name in ("te-mlx", "te-hqq", "te-dense"):
        extra = {"quantization": {"bits": 4, "group_size": 64}} if name == "te-mlx" else {}
        (root / name / "config.json").write_text(json.dumps({**TEXT.transformers(), **extra}))
    AutoencoderKLFlux2(**VAE).bfloat16().save_pretrained(root / "vae")
    return root


def load(name: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model ``name`` at ``path``."""
    return FILES[name][0](path).tensors


def refusal(loader, path) -> str:
    """The message of the ModelFileError that ``loader(path)`` raises: one sentence with the path, fit to be shown."""
    with pytest.raises(ModelFileError) as info:
        loader(path)
    message = str(info.value)
    assert str(path) in message
    sentence = message.replace(str(path), "")
    assert re.search(r": expected .+, found .+; .+\.$", sentence), message
    assert sentence.isprintable() and len(sentence) < 600, message
    assert not re.search(r"[.!?] +[A-Z]", sentence) and "Traceback" not in message, message
    # Nobody may be told to open a file with the restrictions off.
    assert "weights_only" not in message and "(...)" not in message, message
    return message


def read(file: Path) -> dict:
    """The stored tensors by name; those of an HQQ pickle as ``module|part``."""
    if file.suffix == ".safetensors":
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    stored = torch.load(file, weights_only=True)
    if file.name != "qmodel.pt":
        return stored
    return {f"{module}|{key}": value for module, entry in stored.items() for key, value in entry.items()}


def write(file: Path, tensors: dict) -> None:
    """The inverse of :func:`read`."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return
    if file.name == "qmodel.pt":
        modules: dict = {}
        for name, value in tensors.items():
            module, _, key = name.partition("|")
            modules.setdefault(module, {})[key] = value
        tensors = modules
    torch.save(tensors, file)
