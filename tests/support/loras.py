"""LoRA files in every naming, built from what is known of the tools, not from the loader."""

from collections.abc import Callable
from typing import NamedTuple

import torch

#: Layers of the small model by ComfyUI's names, and (layer, which third of its rows or None) by diffusers'.
COMFYUI = {layer: (layer, None) for layer in (
    "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1", "single_blocks.1.linear2",
    "img_in", "final_layer.adaLN_modulation.1")}
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", 2),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv", 1),
    "transformer_blocks.0.ff_context.linear_in": ("double_blocks.0.txt_mlp.0", None),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": ("single_blocks.0.linear1", None),
    "single_transformer_blocks.1.attn.to_out": ("single_blocks.1.linear2", None),
    "x_embedder": ("img_in", None), "norm_out.linear": ("final_layer.adaLN_modulation.1", None)}
#: diffusers' layers that ComfyUI's loaders do not know by any of diffusers' names.
MORE = {"single_stream_modulation.linear": ("single_stream_modulation.lin", None),
        "time_guidance_embed.timestep_embedder.linear_2": ("time_in.out_layer", None)}
SPLIT = {f"double_blocks.0.img_attn.{q}": ("double_blocks.0.img_attn.qkv", i) for i, q in enumerate("qkv")}


class Naming(NamedTuple):
    layers: dict[str, tuple[str, int | None]]
    layer: Callable[[str], str]
    up: str = "lora_B.weight"
    down: str = "lora_A.weight"
    magnitude: str = "dora_scale"


def _flat(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


def _dotted(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer


_KOHYA = ("lora_up.weight", "lora_down.weight")
#: Who writes it -> the naming.
NAMINGS = {
    "ComfyUI (Save LoRA)": Naming(COMFYUI, _dotted("diffusion_model."), *_KOHYA),
    "ai-toolkit": Naming(COMFYUI, _dotted("diffusion_model.")),
    "ai-toolkit, q, k, v apart": Naming(SPLIT, _dotted("diffusion_model.")),
    "BFL, no prefix": Naming(COMFYUI, _dotted("")),
    "fal, PEFT of BFL's model": Naming(COMFYUI, _dotted("base_model.model.")),
    "kohya, musubi-tuner": Naming(COMFYUI, _flat("lora_unet_"), *_KOHYA),
    "musubi-tuner, converted": Naming(COMFYUI, lambda layer: f"diffusion_model.{layer}".replace(
        "_attn.", "_attn_").replace("_mlp.", "_mlp_")),
    "diffusers, SimpleTuner": Naming(DIFFUSERS, _dotted("transformer.")),
    "diffusers, all layers": Naming(DIFFUSERS | MORE, _dotted("transformer.")),
    "DiffSynth": Naming(DIFFUSERS, _dotted(""), "lora_B.default.weight", "lora_A.default.weight"),
    "PEFT of diffusers' model": Naming(DIFFUSERS, _dotted("base_model.model."), magnitude="lora_magnitude_vector"),
    "diffusers, DoRA of PEFT": Naming(DIFFUSERS, _dotted("transformer."), magnitude="lora_magnitude_vector"),
    "kohya, diffusers' layers": Naming(DIFFUSERS, _flat("lora_unet_"), *_KOHYA),
    "OneTrainer": Naming(DIFFUSERS, _flat("lora_transformer_"), *_KOHYA),
    "SimpleTuner, LyCORIS": Naming(DIFFUSERS, _flat("lycoris_"), *_KOHYA),
}
KINDS = ("lora", "lora_without_alpha", "locon", "lokr", "lokr_decomposed", "lokr_of_two_ranks", "loha", "dora", "diff")


def content(naming: Naming, kind: str, shapes, maker) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an adapter on each layer of a naming, by ComfyUI's names for them."""
    result = {}
    for name, (layer, third) in naming.layers.items():
        n, k = shapes[f"{layer}.weight"]
        result[name] = getattr(maker, kind)(n if third is None else n // 3, k)
        up, down = result[name].pop("lora_B.weight", None), result[name].pop("lora_A.weight", None)
        result[name] |= {} if up is None else {"lora_up.weight": up, "lora_down.weight": down}
    return result


def written(naming: Naming, adapters: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The file that a tool of this naming writes."""
    names = {"lora_up.weight": naming.up, "lora_down.weight": naming.down, "dora_scale": naming.magnitude}
    return {f"{naming.layer(layer)}.{names.get(name, name)}":
            tensor.flatten() if names.get(name) == "lora_magnitude_vector" else tensor
            for layer, tensors in adapters.items() for name, tensor in tensors.items()}


def delta(tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to ``weight``, in float64, by the definition of its kind."""
    t = {name: tensor.double().flatten(1) if tensor.ndim > 2 else tensor.double() for name, tensor in tensors.items()}

    def whole(name):
        return t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"]

    rank = next((len(t[name]) for name in ("lora_down.weight", "lokr_w2_b", "lokr_w1_b", "hada_w1_b") if name in t), 0)
    scale = t["alpha"].item() / rank if rank and "alpha" in t else 1.0
    if "diff" in t:
        return t["diff"]
    if "lokr_w1" in t or "lokr_w1_a" in t:
        change = torch.kron(whole("lokr_w1"), whole("lokr_w2"))
    elif "hada_w1_a" in t:
        change = whole("hada_w1") * whole("hada_w2")
    else:
        change = t["lora_up.weight"] @ t["lora_down.weight"]
    if "dora_scale" not in t:
        return scale * change
    merged = weight + scale * change
    by_row = len(t["dora_scale"]) == len(weight)
    norm = weight.norm(dim=1, keepdim=True) if by_row else merged.norm(dim=0, keepdim=True)
    return merged * t["dora_scale"] / norm - weight


def merged(naming: Naming, adapters: dict[str, dict[str, torch.Tensor]], weights: dict[str, torch.Tensor],
           strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights of ComfyUI's layers with the adapters merged in, float64."""
    result = {}
    for name, (layer, third) in naming.layers.items():
        weight = result.setdefault(layer, weights[f"{layer}.weight"].double().clone())
        rows = weight if third is None else weight.chunk(3)[third]
        if name == "norm_out.linear":  # diffusers has (scale, shift), ComfyUI (shift, scale)
            rows.copy_((rows.roll(len(rows) // 2, 0) + strength * delta(
                adapters[name], rows.roll(len(rows) // 2, 0))).roll(len(rows) // 2, 0))
        else:
            rows += strength * delta(adapters[name], rows)
    return result
