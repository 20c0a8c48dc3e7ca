"""What ``gpu_cases.py`` runs: ComfyUI on the CPU, the models given on its command line, their adapters and prompts."""

import os
import sys

TERNARY, BINARY, TEXT_ENCODER = sys.argv[1:4]
sys.argv = sys.argv[:1]
sys.path.insert(0, os.environ["COMFYUI_PATH"])

from comfy.cli_args import args  # noqa: E402

args.cpu = args.use_pytorch_cross_attention = True

import comfy.hooks  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

from bonsai_image.nodes import models  # noqa: E402
from bonsai_image.ops.backends import selfcheck  # noqa: E402

# The first of what can multiply, on the CPU as on the pretended GPU: what measures as the fastest may have other bits.
selfcheck.fastest = lambda ways, *_: ways[0]

LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in")
TEXT_LAYERS = ("layers.3.mlp.gate_proj", "layers.9.self_attn.q_proj")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(model, kind: str, seed=0) -> dict[str, torch.Tensor]:
    """A file of ``kind`` (lora, dora or lokr) for a few layers."""
    result = {}
    for layer in LAYERS:
        n, k = model.model.diffusion_model.get_submodule(layer).weight.shape
        parts = {"lora_up.weight": random(n, 4, seed=seed), "lora_down.weight": random(4, k, seed=seed) * 0.03}
        if kind == "dora":
            parts["dora_scale"] = random(n, 1).abs() + 0.5
        elif kind == "lokr":
            parts = {"lokr_w1": random(4, 8, seed=seed) * 0.3, "lokr_w2": random(n // 4, k // 8, seed=seed) * 0.2}
        result |= {f"diffusion_model.{layer}.{name}": tensor for name, tensor in parts.items()}
    return result


def text_adapter(clip, layers) -> dict[str, torch.Tensor]:
    result = {}
    for layer in layers:
        n, k = clip.cond_stage_model.qwen3_4b.transformer.model.get_submodule(layer).weight.shape
        name = f"text_encoders.qwen3_4b.transformer.model.{layer}"
        result |= {f"{name}.lora_up.weight": random(n, 4) * 0.1, f"{name}.lora_down.weight": random(4, k) * 0.1}
    return result


def with_lora(model, file, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, dict(file), strength, 0.0)[0]


def draw(model, hook=None, between=None, batch=1, reference=None):
    """A latent after two steps."""
    noise = random(batch, 128, 4, 6, seed=3)
    conditions = [[[random(1, 20, 3 * 2560, seed=seed), {}]] for seed in (4, 5)]
    if reference is not None:
        conditions[0][0][1]["reference_latents"] = [reference]
    if hook is not None:
        conditions[0] = comfy.hooks.set_hooks_for_conditioning(
            conditions[0], comfy.hooks.create_hook_lora(dict(hook), 1.0, 0.0))
    with torch.inference_mode():
        result = comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", *conditions, torch.zeros_like(noise),
                                     seed=3, callback=between, disable_pbar=True)
        return getattr(result, "held", result)


def encode(clip, file=None):
    """The conditioning of 20 tokens; with ``file``, of a CLIP with that LoRA."""
    if file is not None:
        clip = comfy.sd.load_lora_for_models(None, clip, dict(file), 0.0, 1.0)[1]
    with torch.inference_mode():
        result = clip.encode_from_tokens({"qwen3_4b": [[(i * 37 % 4000, 1.0) for i in range(20)]]})
        return getattr(result, "held", result)


def saved(model):
    """The bytes that a file of the packed layers would hold."""
    with torch.inference_mode():
        tensors = {name: tensor for name, tensor in model.model.diffusion_model.state_dict().items()
                   if "norm" not in name}  # in whose dtype the host makes norms, depends on the device
        return torch.cat([getattr(t, "held", t).contiguous().view(-1).view(torch.uint8) for t in (
            tensors[name].to("cpu") for name in sorted(tensors)) if t.dim()])


def load(path=TERNARY):
    with torch.inference_mode():
        return models.load_model(path, "bf16")


def load_clip():
    with torch.inference_mode():
        return models.load_clip(TEXT_ENCODER, "fp32")


class Files:
    """The adapters, made once on the CPU."""

    def __init__(self, model, clip):
        self.lora, self.other = adapter(model, "lora"), adapter(model, "lora", seed=1)
        self.dora, self.lokr = adapter(model, "dora"), adapter(model, "lokr")
        self.text, self.table = text_adapter(clip, TEXT_LAYERS), text_adapter(clip, ["embed_tokens"])
        self.reference = random(1, 128, 4, 4, seed=8)


def cpu_results():
    """The adapters, and what everything below must give: name -> tensor."""
    model, clip = load(), load_clip()
    files = Files(model, clip)
    stacked = with_lora(with_lora(model, files.lora, 0.8), files.lokr, -0.4)
    results = {
        "plain": draw(model), "binary": draw(load(BINARY)), "lora": draw(with_lora(model, files.lora)),
        "half": draw(with_lora(model, files.lora, 0.5)), "dora": draw(with_lora(model, files.dora)),
        "lokr": draw(with_lora(model, files.lokr)), "stacked": draw(stacked), "batch": draw(model, batch=2),
        "reference": draw(model, reference=files.reference), "clip": encode(clip),
        "clip lora": encode(clip, files.text), "clip table": encode(clip, files.table), "saved": saved(model),
    }
    same = [(a, b) for a in results for b in results
            if a < b and results[a].shape == results[b].shape and torch.equal(results[a], results[b])]
    management.unload_all_models()
    return files, results, same
