"""Model files for the tests, written by the libraries that write the published ones.

Everything starts from one dense diffusers model per variant, whose block weights are exactly ternary or binary.
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

GROUP = 128
LAB = Path(__file__).parents[1] / "lab"

SMALL = {"in_channels": 32, "out_channels": 32, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128,
         "num_attention_heads": 2, "joint_attention_dim": 96, "guidance_embeds": False, "patch_size": 1}


def packed_names(model: torch.nn.Module) -> list[str]:
    """The linears inside the blocks, which Bonsai packs."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name]


def dense_model(bits: int, seed: int = 0, group: int = GROUP) -> Flux2Transformer2DModel:
    """A small FLUX.2 transformer in BF16 whose block weights are {-s, 0, s} or {-s, s} per ``group``."""
    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(**SMALL).bfloat16().eval().requires_grad_(False)
    for name in packed_names(model):
        weight = model.get_submodule(name).weight
        n, k = weight.shape
        scale = (torch.rand(n, k // group, 1) + 0.5).mul(k**-0.5).bfloat16()
        levels = torch.randint(-1, 2, (n, k // group, group)) if bits == 2 else \
            torch.randint(0, 2, (n, k // group, group)) * 2 - 1
        weight.copy_((levels * scale).view(n, k))
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def levels_and_scale(weight: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Integer levels (N, K) and BF16 scales (N, K / 128) of a dense Bonsai weight."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    return groups.sign().to(torch.int8).view(weight.shape).numpy(), groups.abs().amax(-1).bfloat16()


def write_diffusers(model: Flux2Transformer2DModel, folder: Path, shard: str = "10GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@functools.cache
def packed_by_gemlite() -> dict[str, torch.Tensor]:
    """GemLite's tensors of both dense models, after ``bits``: its process takes seconds to start."""
    layers = {}
    for bits in (1, 2):
        model = dense_model(bits)
        for name in packed_names(model):
            levels, scale = levels_and_scale(model.get_submodule(name).weight)
            # Binary: code 0, 1 -> -s, s is (code - 0.5) * 2 s. Ternary: (code - 1) * s.
            codes = torch.from_numpy(levels + 1 if bits == 2 else (levels + 1) // 2).to(torch.uint8)
            zero = torch.full_like(scale, 1.0 if bits == 2 else 0.5)
            layers[f"{bits}.{name}"] = (codes, scale if bits == 2 else 2 * scale, zero, bits)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(layers, f"{folder}/layers.pt")
        subprocess.run([sys.executable, LAB / "gemlite_layers.py", f"{folder}/layers.pt", f"{folder}/packed.pt"],
                       check=True, capture_output=True, text=True)
        return torch.load(f"{folder}/packed.pt", weights_only=True)


def write_gemlite(folder: Path, bits: int) -> Path:
    """A GemLite folder of :func:`dense_model` whose packed layers GemLite itself has packed."""
    folder.mkdir(parents=True)
    model = dense_model(bits)
    packed = {f"{name}.weight" for name in packed_names(model)}
    state = {name[2:]: tensor.clone() for name, tensor in packed_by_gemlite().items() if name[0] == str(bits)}
    state |= {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    torch.save(state, folder / "state_dict.pt")
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "quantization_config.json").write_text(json.dumps({"bits": bits, "group_size": GROUP}))
    return folder


def write_mlx(model: Flux2Transformer2DModel, folder: Path, bits: int) -> Path:
    """An MLX folder, written by MLX, whose words MLX itself dequantizes to the dense weights."""
    import mlx.core as mx

    folder.mkdir(parents=True)
    arrays = {}
    packed = packed_names(model)
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer not in packed:
            arrays[name] = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
            continue
        levels, scale = levels_and_scale(tensor)
        codes = (levels + 1 if bits == 2 else (levels + 1) // 2).astype(np.uint32).reshape(len(levels), -1, 32 // bits)
        words = np.bitwise_or.reduce(codes << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
        s = mx.array(scale.float().numpy())
        scales, biases = (s if bits == 2 else 2 * s), -s
        dense = mx.dequantize(mx.array(words), scales, biases, GROUP, bits)
        assert np.array_equal(np.array(dense), tensor.float().numpy()), "MLX reads other weights"
        arrays |= {name: mx.array(words), f"{layer}.scales": scales.astype(mx.bfloat16),
                   f"{layer}.biases": biases.astype(mx.bfloat16)}
    mx.save_safetensors(str(folder / "diffusion_pytorch_model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "quantization_config.json").write_text(json.dumps({"bits": bits, "group_size": GROUP}))
    return folder


TEXT = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 28, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "max_position_embeddings": 2048}


def text_model(seed: int = 0) -> Qwen3Model:
    torch.manual_seed(seed)
    return Qwen3Model(Qwen3Config(**TEXT)).eval().requires_grad_(False)


def write_mlx_text_encoder(model: Qwen3Model, folder: Path) -> Path:
    """MLX affine 4-bit, group 64, quantized by MLX, the embedding too."""
    import mlx.core as mx

    folder.mkdir(parents=True)
    arrays = {}
    for name, tensor in model.state_dict().items():
        array = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
        if tensor.ndim != 2:
            arrays[f"model.{name}"] = array
            continue
        words, scales, biases = mx.quantize(array, group_size=64, bits=4)
        layer = name.removesuffix(".weight")
        arrays |= {f"model.{name}": words, f"model.{layer}.scales": scales, f"model.{layer}.biases": biases}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**TEXT, "quantization": {"bits": 4, "group_size": 64}}))
    return folder


def write_hqq_text_encoder(folder: Path, seed: int = 0):
    """HQQ 4-bit, group 64, quantized and saved by hqq. Returns the quantized model."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT)).half().eval()
    AutoHQQHFModel.quantize_model(model, quant_config=BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
                                  compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(folder))
    return model


def write_comfyui_single(tensors: dict[str, torch.Tensor], path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
