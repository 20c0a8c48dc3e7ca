"""The trained miniature as files.

``write`` makes what the repository keeps, each part once: a ternary repository in the layout of the MLX releases, the
binary model in our format, the dense reference in diffusers' layout. ``write_layouts`` makes the other published
layouts from those, without loss.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from bonsai_image.loaders import Transformer, load_text_encoder, load_transformer, save_transformer
from bonsai_image.loaders.formats import mlx
from bonsai_image.miniature.train.text import TEXT
from bonsai_image.miniature.train.transformer import KLEIN, SCHEDULER
from bonsai_image.ops.packed import is_packed

REPOSITORY = "ternary"
_TRANSFORMER, _TEXT_ENCODER = "transformer-packed-mflux", "text_encoder-mlx-4bit"


def write(folder: Path, models: dict[str, dict[str, torch.Tensor]], encoder: dict[str, torch.Tensor], tokenizer,
          vae: AutoencoderKLFlux2, lora: dict[str, torch.Tensor]) -> None:
    """Write ``models`` (diffusers-named tensors by variant), the parts they share and a LoRA to ``folder``, replacing
    what an earlier run wrote there."""
    repository = folder / REPOSITORY
    for old in (repository, folder / "dense"):
        shutil.rmtree(old, ignore_errors=True)
    for old in (folder / "binary.safetensors", folder / "blue_pot_lora.safetensors"):
        old.unlink(missing_ok=True)
    save_transformer(_transformer(models["ternary"]), repository / _TRANSFORMER, "mlx")
    save_transformer(_transformer(models["binary"]), folder / "binary.safetensors", "comfy")
    (folder / "dense").mkdir()
    save_file(models["dense"], folder / "dense" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    _write_json(folder / "dense" / "config.json", {"_class_name": "Flux2Transformer2DModel", **KLEIN.diffusers()})
    save_file(lora, folder / "blue_pot_lora.safetensors", {"format": "pt"})
    (repository / _TEXT_ENCODER).mkdir()
    save_file(mlx.encode(encoder), repository / _TEXT_ENCODER / "model.safetensors", {"format": "mlx"})
    _write_json(repository / _TEXT_ENCODER / "config.json",
                {**TEXT.transformers(), "quantization": {"bits": 4, "group_size": 64}})
    tokenizer.save_pretrained(repository / "tokenizer")
    vae.bfloat16().save_pretrained(repository / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(repository / "scheduler")
    _write_json(repository / "model_index.json", {"_class_name": "Flux2KleinPipeline"})
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def _transformer(tensors: dict[str, torch.Tensor]) -> Transformer:
    return Transformer(Path("miniature"), "mlx", tensors, KLEIN, {"bonsai.source": "miniature/train"})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_layouts(folder: Path, target: Path) -> None:
    """Write ternary and binary as GemLite, MLX, unpacked and our own files, and the encoder as HQQ (with the hqq
    library, from the values of the 4-bit one), to ``target``."""
    sources = {"ternary": folder / REPOSITORY / _TRANSFORMER, "binary": folder / "binary.safetensors"}
    for variant, source in sources.items():
        model = load_transformer(source)
        for layout in ("mlx", "gemlite", "diffusers"):
            save_transformer(model, target / f"{variant}-{layout}", layout)
        save_transformer(model, target / f"{variant}.safetensors", "comfy")
    save_transformer(load_transformer(sources["ternary"]), target / "ternary-base3.safetensors", "comfy-base3")
    _write_hqq(folder / REPOSITORY / _TEXT_ENCODER, target / "text_encoder-hqq-4bit")


def _write_hqq(source: Path, target: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    dense = {name: (tensor.to(dtype=torch.float16).dequantize() if is_packed(tensor) else tensor.half())
             for name, tensor in load_text_encoder(source).tensors.items()}
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT.transformers())).half()
    model.load_state_dict(dense, strict=False)
    AutoHQQHFModel.quantize_model(model.eval(), quant_config=BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
                                  compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(target))
