"""The published repositories with their names, shapes, dtypes and JSON files, at full size, but with zeros for weights.

Weight files are as long as the published ones, to the byte: each is laid out as its publisher's library lays it out.
The safetensors library's files are sparse and take no room on disk; MLX's files and the pickles are written in full.
"""

import json
import struct
from collections import OrderedDict
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from bonsai_image.loaders.klein import KleinConfig, diffusers_shapes, is_packable
from bonsai_image.loaders.qwen3 import Qwen3Config, qwen3_shapes

KLEIN = KleinConfig()
TEXT = Qwen3Config()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_NAMES = {BF16: "BF16", torch.int64: "I64", torch.uint32: "U32"}

INDEX = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"}
TRANSFORMER_JSON = {
    "_class_name": "Flux2Transformer2DModel", "_diffusers_version": "0.37.1",
    "_name_or_path": "black-forest-labs/FLUX.2-klein-4B", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32],
    "enable_time_sign_embed": False, "eps": 1e-06, "guidance_embeds": False, "in_channels": 128,
    "joint_attention_dim": 7680, "mlp_ratio": 3.0, "musubi_block_swap_device": "cpu", "musubi_blocks_to_swap": 0,
    "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1,
    "rope_theta": 2000, "timestep_guidance_channels": 256}
VAE_JSON = {
    "_class_name": "AutoencoderKLFlux2", "_diffusers_version": "0.37.1",
    "_name_or_path": "black-forest-labs/FLUX.2-klein-base-4B", "act_fn": "silu", "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1, "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": None,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3, "latent_channels": 32,
    "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "patch_size": [2, 2], "sample_size": 1024, "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": True,
    "use_quant_conv": True}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
    "intermediate_size": 9728, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "tie_word_embeddings": True, "vocab_size": 151936}
#: All tensors of the 4-bit encoder, as its published index says.
MLX_TEXT_BYTES = 2262920192
MLX_TEXT_JSON = {**_QWEN3, "quantization": {"group_size": 64, "bits": 4},
                 "quantization_config": {"group_size": 64, "bits": 4}, "torch_dtype": "bfloat16"}
HQQ_TEXT_JSON = {**_QWEN3, "dtype": "float16", "layer_types": ["full_attention"] * 36}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_sparse(path: Path, shapes: Shapes, metadata: dict | None = None) -> None:
    """A safetensors file of zeros, laid out as the safetensors library does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def mlx(shapes: dict[str, tuple[int, ...]], bits: int, group: int, is_packed) -> Shapes:
    """What MLX stores for a model of these shapes."""
    result: Shapes = {}
    for name, shape in sorted(shapes.items()):
        if not is_packed(name, shape):
            result[name] = (BF16, shape)
            continue
        layer, (n, k) = name.removesuffix(".weight"), shape
        result[name] = (torch.uint32, (n, k * bits // 32))
        result |= {f"{layer}.{part}": (BF16, (n, k // group)) for part in ("scales", "biases")}
    return result


def write_by_mlx(path: Path, shapes: Shapes) -> None:
    """A safetensors file of zeros by MLX itself, whose order is that of a hash table: it hangs on the order in which
    mlx-lm's modules name the tensors."""
    import mlx.core as mx

    order = ["embed_tokens", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "mlp",
             "gate_proj", "down_proj", "up_proj", "input_layernorm", "post_attention_layernorm", "norm",
             "weight", "scales", "biases"]
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(shapes, key=lambda name: [int(part) if part.isdigit() else order.index(part)
                                             for part in name.split(".")[1:]])
    dtypes = {BF16: mx.bfloat16, torch.uint32: mx.uint32}
    mx.save_safetensors(str(path), {name: mx.zeros(shape, dtypes[dtype]) for name in names
                                    for dtype, shape in [shapes[name]]}, {"format": "mlx"})


class GemLite(nn.Module):
    """What GemLite 0.5 stores of a linear without a bias, zeros."""

    def __init__(self, bits: int, n: int, k: int) -> None:
        super().__init__()
        metadata = [0, bits, 128, 2**bits - 1, 8 // bits, 1, 1, 0, 0, 0, 4, 1]
        for name, tensor in {
            "W_q": torch.zeros(k * bits // 8, n, dtype=torch.uint8),
            "scales": torch.zeros(k // 128, n), "zeros": torch.zeros(k // 128, n),
            "metadata": torch.tensor(metadata, dtype=torch.int32),
            "orig_shape": torch.tensor((n, k), dtype=torch.int32),
        }.items():
            self.register_buffer(name, tensor)


def gemlite(bits: int) -> OrderedDict[str, torch.Tensor]:
    """The state dict of diffusers' model with GemLite's linears, zeros. Its ``_metadata`` names every module."""
    with init_empty_weights():
        model = Flux2Transformer2DModel(**{key: value for key, value in TRANSFORMER_JSON.items()
                                           if not key.startswith(("_", "musubi", "enable"))})
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_packable(f"{name}.weight"):
            model.set_submodule(name, GemLite(bits, module.out_features, module.in_features))
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            state[name] = torch.zeros(tensor.shape, dtype=BF16)
    return state


def hqq() -> dict[str, dict]:
    """What hqq saves of the text encoder, zeros: codes as parameters. The language-model head is the embedding."""
    result: dict[str, dict] = {}
    for name, shape in qwen3_shapes(TEXT).items():
        module = name.removesuffix(".weight")
        if len(shape) == 1 or "embed_tokens" in name:
            result[module] = {"weight": torch.zeros(shape, dtype=FP16)}
            continue
        groups = shape[0] * shape[1] // 64
        codes = torch.zeros(groups // 2, 64, dtype=torch.uint8)
        result[module] = {
            "W_q": nn.Parameter(codes, requires_grad=False), "nbits": 4, "group_size": 64,
            "shape": torch.Size(shape), "scale": torch.zeros(groups, 1, dtype=FP16),
            "zero": torch.zeros(groups, 1, dtype=FP16), "axis": 1, "packing": "4bit_u8",
            "unpack_view_dtype": torch.uint8, "view_as_float": False, "quant_scale": False, "quant_zero": False,
            "compute_dtype": FP16, "offload_meta": False, "stores_quant_config": True, "channel_wise": True,
            "optimize": True, "round_zero": True}
    result["lm_head"] = {"weight": result["model.embed_tokens"]["weight"].detach()}
    return result


def save_as_cuda(value, path: Path) -> None:
    """``torch.save`` with storages that say they come from the first GPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    registry = torch.serialization._package_registry
    # A new string each time, as PyTorch makes: the pickle repeats it. One string for all would be stored once.
    torch.serialization.register_package(0, lambda storage: "cuda:" + str(0), lambda storage, location: None)
    try:
        torch.save(value, path)
    finally:
        registry[:] = [entry for entry in registry if entry[0] != 0]


def vae_shapes() -> Shapes:
    with init_empty_weights():
        model = AutoencoderKLFlux2(**{key: value for key, value in VAE_JSON.items() if not key.startswith("_")
                                      and key not in ("force_upcast", "decoder_block_out_channels")})
    return {name: (BF16 if tensor.is_floating_point() else torch.int64, tuple(tensor.shape))
            for name, tensor in sorted(model.state_dict().items())}


def tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json"):
        write_json(folder / name, {})


def write_mlx(path: Path, bits: int) -> Path:
    """A repository in the layout of the MLX releases."""
    write_json(path / "model_index.json", INDEX)
    write_json(path / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    write_json(path / "transformer-packed-mflux" / "config.json", TRANSFORMER_JSON)
    write_json(path / "transformer-packed-mflux" / "quantization_config.json", {
        "bits": bits, "group_size": 128, "format": "mlx-packed-affine", "skip_patterns": ["norm"]})
    shapes = mlx(diffusers_shapes(KLEIN), bits, 128, lambda name, _: is_packable(name))
    write_sparse(path / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors", shapes)
    encoder = path / "text_encoder-mlx-4bit"
    shapes = mlx(qwen3_shapes(TEXT), 4, 64, lambda _, shape: len(shape) == 2)
    write_json(encoder / "config.json", MLX_TEXT_JSON)
    write_json(encoder / "model.safetensors.index.json", {"metadata": {"total_size": MLX_TEXT_BYTES}, "weight_map": {
        name: "model.safetensors" for name in shapes}})
    write_by_mlx(encoder / "model.safetensors", shapes)
    for folder in (encoder, path / "tokenizer"):
        tokenizer(folder)
    return _with_vae(path, {key: value for key, value in VAE_JSON.items() if key != "decoder_block_out_channels"})


def write_gemlite(path: Path, bits: int) -> Path:
    """A repository in the layout of the GemLite releases: no scheduler, a tokenizer inside the text encoder."""
    write_json(path / "model_index.json", INDEX)
    folder = path / f"transformer-gemlite-int{bits}"
    write_json(folder / "config.json", TRANSFORMER_JSON)
    write_json(folder / "quantization_config.json", {
        "bits": bits, "group_size": 128, "packing_bitwidth": 8, "quantized_count": 100, "skipped_count": 9})
    write_json(folder / "gemlite_autotune.json", {})
    save_as_cuda(gemlite(bits), folder / "state_dict.pt")
    write_json(path / "text_encoder-hqq-4bit" / "config.json", HQQ_TEXT_JSON)
    save_as_cuda(hqq(), path / "text_encoder-hqq-4bit" / "qmodel.pt")
    tokenizer(path / "text_encoder-hqq-4bit" / "tokenizer")
    return _with_vae(path, VAE_JSON)


def write_unpacked(path: Path) -> Path:
    """A repository in the layout of the unpacked releases, which is diffusers' own."""
    write_json(path / "model_index.json", INDEX)
    write_json(path / "transformer" / "config.json", TRANSFORMER_JSON)
    write_sparse(path / "transformer" / "diffusion_pytorch_model.safetensors", {
        name: (BF16, shape) for name, shape in sorted(diffusers_shapes(KLEIN).items())})
    shapes = qwen3_shapes(TEXT)
    shapes["model.norm.weight"] = shapes.pop("model.norm.weight")  # last, as in the model
    shards = split_torch_state_dict_into_shards({
        name: torch.empty(shape, dtype=BF16, device="meta") for name, shape in shapes.items()})
    for file, names in shards.filename_to_tensors.items():
        write_sparse(path / "text_encoder" / file, {name: (BF16, shapes[name]) for name in names}, {"format": "pt"})
    write_json(path / "text_encoder" / "model.safetensors.index.json", {"weight_map": shards.tensor_to_filename})
    write_json(path / "text_encoder" / "config.json", HQQ_TEXT_JSON)
    return _with_vae(path, VAE_JSON)


def _with_vae(path: Path, config: dict) -> Path:
    write_json(path / "vae" / "config.json", config)
    write_sparse(path / "vae" / "diffusion_pytorch_model.safetensors", vae_shapes(), {"format": "pt"})
    return path
