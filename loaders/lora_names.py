"""How tools name the tensors of a LoRA for FLUX.2, and what that is in the naming of ComfyUI's own loaders.

Dots and underscores count alike, so that every mixture of the two is understood (kohya's, LyCORIS', musubi-tuner's
conversion). Prefixes may follow one another.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .klein import MLP_RATIO, layers
from .names import FINAL_MODULATION

#: ComfyUI's names for the tensors of an adapter -> what tools call them, as regular expressions.
_TENSORS = {
    "lora_up.weight": r"lora_B|lora[_.]up|lora_linear_layer\.up",
    "lora_down.weight": r"lora_A|lora[_.]down|lora_linear_layer\.down",
    **{name: name for kind in ("lokr_w", "hada_w") for name in
       (f"{kind}{i}{part}" for i in "12" for part in ("", "_a", "_b"))},
    "dora_scale": "dora_scale|lora_magnitude_vector",
    "alpha": "(?:lora_|network_)?alpha",
    "diff": "diff|w_norm",
}
#: With the name that PEFT gives an adapter in the end.
_PATTERNS = {name: re.compile(rf"(.+?)[._](?:{pattern})(?:\.(?!bias\b|weight\b)[\w-]+)?(?:\.weight)?")
             for name, pattern in _TENSORS.items()}
#: Tensors that are in nothing but an adapter.
_SURE = [pattern for name, pattern in _PATTERNS.items() if name != "alpha"]
#: How the layers of text encoders are called.
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?[._]|clip_|qwen3)")

#: What stands before the name of a layer -> who writes it so.
_PREFIXES = {
    "base_model_model_": "PEFT", "lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS",
    "diffusion_model_": "ComfyUI", "transformer_": "diffusers", "pipe_dit_": "DiffSynth", "dit_": "DiffSynth",
    "unet_": "diffusers", "model_": "ComfyUI", "module_": "torch", "orig_mod_": "torch", "": "no prefix",
}
#: Names for parts of a layer, and for what diffusers has joined, as one of the names that are known.
_SAME = [(re.compile(pattern), name) for pattern, name in (
    (r"^transformer_(blocks_\d+)_attn_to_qkv$", r"double_\1_img_attn_qkv"),
    (r"^transformer_(blocks_\d+)_attn_to_added_qkv$", r"double_\1_txt_attn_qkv"),
    (r"^double_(blocks_\d+)_img_attn_(?:to_)?([qkv])(?:_proj)?$", r"transformer_\1_attn_to_\2"),
    (r"^double_(blocks_\d+)_txt_attn_(?:to_)?([qkv])(?:_proj)?$", r"transformer_\1_attn_add_\2_proj"))]
#: How the tensors end that ComfyUI's loaders read, if they know the layer.
READ_BY_COMFYUI = re.compile(r"\.(lora_([AB](\.default)?|up|down)\.weight|lora_[AB]|"
                             r"lora(_linear_layer)?\.(up|down)\.weight|lokr_\w+|hada_\w+|alpha|dora_scale|diff|w_norm)$")
#: Layers that ComfyUI's loaders know only by ComfyUI's own names.
_UNKNOWN_TO_COMFYUI = re.compile(r"time_guidance|_modulation")


#: The most double- and single-stream blocks that a model of this family has: FLUX.1, and FLUX.2 dev.
_BLOCKS = 19, 48


class Target(NamedTuple):
    """A layer, or the ``part`` (first, count, of) of its rows that is one of so many equal ones. ``name`` is what
    ComfyUI's loaders call it."""

    name: str
    layer: str
    part: tuple[int, int, int] | None = None

    def place(self, rows: int) -> tuple[int, int] | None:
        """The first row and the number of rows, if the layer has ``rows``."""
        return self.part and (self.part[0] * rows // self.part[2], self.part[1] * rows // self.part[2])


class Name(NamedTuple):
    """What the name of a layer means. ``naming``: whose it is; ``swapped``: with the halves of the rows the other way
    round; ``comfyui``: whether ComfyUI's loaders know it."""

    target: Target
    naming: str
    swapped: bool
    comfyui: bool


def of_lora(name: str) -> bool:
    """Whether a tensor of this name can be in nothing but a LoRA."""
    return any(pattern.fullmatch(name) for pattern in _SURE)


def split(name: str) -> tuple[str, str]:
    """The name of a layer, and ComfyUI's for this tensor of an adapter on it; ``""`` for one that no adapter has."""
    found = ((match[1], tensor) for tensor, pattern in _PATTERNS.items() if (match := pattern.fullmatch(name)))
    return next(found, (name, ""))


def _flat(name: str) -> str:
    return name.replace(".", "_").strip("_")


def _layers() -> Iterator[tuple[str, bool, Target]]:
    """Every name of a layer, whether it is diffusers', and what it means."""
    for tensor, (sources, _) in layers(*_BLOCKS).items():
        layer = tensor.removesuffix(".weight")
        yield layer, False, Target(f"diffusion_model.{layer}", layer)
        for i, source in enumerate(source.removesuffix(".weight") for source in sources):
            part = (i, 1, len(sources)) if len(sources) > 1 else None
            yield source, True, Target(f"transformer.{source}" if part else f"diffusion_model.{layer}", layer, part)
    of = 3 + 2 * MLP_RATIO
    for i in range(_BLOCKS[1]):
        layer = f"single_blocks.{i}.linear1"
        yield f"{layer}_qkv", False, Target(f"diffusion_model.{layer}_qkv", layer, (0, 3, of))
        for j, source in enumerate(f"single_transformer_blocks.{i}.attn.to_{q}" for q in "qkv"):
            yield source, True, Target(f"transformer.{source}", layer, (j, 1, of))


_LAYERS = {_flat(name): (name, diffusers, target) for name, diffusers, target in _layers()}


def find(name: str) -> Name | None:
    """What the name of a layer in a file means."""
    rest, prefix = _flat(name), ""
    while (found := _LAYERS.get(_same(rest))) is None:
        longer = next((prefix for prefix in _PREFIXES if prefix and rest.startswith(prefix)), None)
        if longer is None:
            return None
        prefix, rest = longer, rest.removeprefix(longer).strip("_")
    dotted, diffusers, target = found
    known = (dotted, f"transformer.{dotted}", f"lycoris_{_flat(dotted)}", f"lora_transformer_{_flat(dotted)}") if (
        diffusers) else (f"diffusion_model.{dotted}", f"lora_unet_{_flat(dotted)}")
    whose = "diffusers'" if diffusers else "ComfyUI's"
    swapped = diffusers and target.layer == FINAL_MODULATION
    return Name(target, f"{_PREFIXES[prefix]}, {whose} names of layers", swapped,
                name in known and not (diffusers and _UNKNOWN_TO_COMFYUI.search(dotted)))


def _same(name: str) -> str:
    for pattern, replacement in _SAME:
        name = pattern.sub(replacement, name)
    return name
