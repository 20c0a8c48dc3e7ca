"""LoRA files: every naming that people have into one form, that of ComfyUI's own loaders, and back to a file."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..ops.side_paths import Adapter, Patch
from .check import Shapes
from .errors import DOWNLOAD_AGAIN, ModelFileError, refusing
from .files import SAFETENSORS_SUFFIXES, read_json
from .klein import KleinConfig, comfyui_shapes
from .lora_names import READ_BY_COMFYUI, TEXT_ENCODER, Target, find, of_lora, split
from .models import difference, save
from .opening import open_tensors

#: What the format of :func:`save_lora` is called.
COMFY_LORA = "comfy-lora"
#: The metadata of a LoRA by ``recover``.
RECOVERY = "bonsai.recovery"
#: Models that share names of layers, by their dimensions.
_MODELS = {
    "FLUX.2 Klein 4B": KleinConfig(),
    "FLUX.2 Klein 9B": KleinConfig(32, 12288, num_layers=8, num_single_layers=24),
    "FLUX.2 dev": KleinConfig(48, 15360, num_layers=8, num_single_layers=48),
}
#: Names of layers that FLUX.1 has and FLUX.2 has not.
_FLUX1 = re.compile(r"(img|txt)_mod[._]|norm1[._]|norm1_context|proj_mlp|single_blocks[._]\d+[._]modulation|"
                    r"single_transformer_blocks[._]\d+[._]norm[._]|ff[._]net|vector_in|text_embedder")
#: Which tensors make which kind, besides alpha and the magnitude of a DoRA.
_KINDS = {
    frozenset(("lora_up.weight", "lora_down.weight")): "LoRA",
    frozenset(f"hada_w{i}_{part}" for i in (1, 2) for part in "ab"): "LoHa",
    frozenset(("diff",)): "difference",
    **{frozenset((*one, *other)): "LoKr" for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
       for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))},
}
#: The tensors that hold all rows of a layer, or of one that is a Kronecker product the blocks of rows.
_OF_ROWS = {"lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "lokr_w1", "lokr_w1_a", "dora_scale"}
#: Tensors of biases, which no layer of FLUX.2 has.
_BIAS = re.compile(r"\.(bias|diff_b|b_norm)$")

#: The tensors of an adapter by ComfyUI's names.
Group = dict[str, torch.Tensor]


@dataclass
class Lora:
    """The content of a LoRA file. ``groups`` has the adapter on each target.

    ``unknown`` are the tensors of no layer or kind that is known, ``text_encoder`` those of a text encoder. ``naming``
    counts layers by naming, ``ignored`` those that ComfyUI's own loaders ignore.
    """

    path: Path
    metadata: dict[str, str]
    groups: dict[Target, Group] = field(default_factory=dict)
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)
    text_encoder: dict[str, torch.Tensor] = field(default_factory=dict)
    naming: Counter[str] = field(default_factory=Counter)
    ignored: int = 0

    def said(self, key: str) -> dict[str, Any]:
        """The JSON object that is the metadata of ``key``; empty without. Raises ModelFileError."""
        with refusing(self.path, "metadata that can be read", DOWNLOAD_AGAIN, ValueError, RecursionError):
            said = json.loads(self.metadata.get(key, "{}"))
        return said if isinstance(said, dict) else {}

    def kinds(self) -> Counter[str]:
        """Layers by kind."""
        return Counter(f"{_kind(group)}{' with DoRA' if 'dora_scale' in group else ''}"
                       for group in self.groups.values())

    def ranks(self) -> list[int]:
        """Of the layers in factors."""
        return sorted({len(tensor) for group in self.groups.values() for name, tensor in group.items()
                       if name == "lora_down.weight" or name.endswith("_b")})

    def fitting(self, shapes: Shapes, strength: float = 1.0,
                device: torch.device | str = "cpu") -> dict[str, list[Patch]]:
        """The patches that fit weights of ``shapes`` (by ComfyUI's names), by ComfyUI's name of the layer."""
        found: dict[str, list[Patch]] = {}
        for target, stored in self.groups.items():
            group = {name: tensor.to(device) for name, tensor in stored.items()}
            change, shape = adapter(group), shapes.get(f"{target.layer}.weight")
            if change and shape:
                patch = Patch(change, strength, target.place(shape[0]), group.get("dora_scale"))
                if patch.fits(shape):
                    found.setdefault(target.layer, []).append(patch)
        return found

    def made_for(self) -> str:
        """The model that it was made for, by its names and shapes."""
        fits = {name: sum(map(len, self.fitting(comfyui_shapes(config)).values())) for name, config in _MODELS.items()}
        if any(map(_FLUX1.search, self.unknown)):
            return "FLUX.1"
        most = max(fits.values())
        return next(name for name in fits if fits[name] == most) if 2 * most > len(self.groups) else "another model"

    def without_effect(self, applied: int) -> list[str]:
        """What has no effect on a model that ``applied`` of the layers fit, as sentences without an end."""
        unfit = len(self.groups) - applied
        found = ((unfit, f"of {len(self.groups)} layers do not fit, for it was made for {self.made_for()}", ()),
                 (len(self.unknown), "tensors are of no known layer or kind", [*self.unknown][:3]),
                 (len(self.text_encoder), "tensors are for a text encoder", [*self.text_encoder][:1]))
        return [f"{count} {what}{': ' if names else ''}{', '.join(names)}" for count, what, names in found if count]


def load_lora(path: Path | str) -> Lora:
    """Read the LoRA at ``path``, in any naming. Raises ModelFileError."""
    file = open_tensors(Path(path), mmap=False)
    if not any(map(of_lora, file.tensors)):
        raise ModelFileError(file.path, "a LoRA", file.sample(),
                             "choose a LoRA for FLUX.2 Klein 4B")
    result = Lora(file.path, file.metadata)
    said = _configuration(result)
    members: dict[str, list[tuple[str, str]]] = {}
    for key, tensor in file.tensors.items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor.float()).all():
            raise ModelFileError(file.path, "finite numbers", f"others in {key}")
        layer, name = split(key)
        members.setdefault(layer, []).append((key, name))
    # A layer with a tensor of another kind as well is not what the others alone would make of it.
    more = {key[:dot.start()] for key, ((_, name), *_) in members.items() if not name and not _BIAS.search(key)
            for dot in re.finditer(r"\.", key)}
    for layer, keys in members.items():
        tensors, found = {key: file.tensors[key] for key, _ in keys}, find(layer)
        group = {name: file.tensors[key] for key, name in keys}
        twice = len(group) < len(keys) or (found and found.target in result.groups)
        if found and not twice and layer not in more and _complete(group, layer, said, found.swapped):
            result.groups[found.target] = group
            result.naming[found.naming] += 1
            result.ignored += not (found.comfyui and all(READ_BY_COMFYUI.search(key) for key, _ in keys))
        elif TEXT_ENCODER.match(layer):
            result.text_encoder |= tensors
        else:
            result.unknown |= tensors
    return result


def save_lora(lora: Lora, path: Path) -> None:
    """Write ``lora`` to one safetensors file in the naming of ComfyUI's own loaders: the same factors, metadata, and
    tensors that are not understood. Raises ModelFileError, also for an existing path."""
    tensors = {f"{target.name}.{name}": tensor.contiguous() for target, group in lora.groups.items()
               for name, tensor in group.items()} | lora.unknown | lora.text_encoder

    def verify(written: Path) -> str | None:
        # Torch compares no FP8.
        found = open_tensors(written).tensors
        expected, there = ({name: each[name].float() for name in tensors} for each in (tensors, found))
        return difference(expected, there)

    save(lora.path, path, COMFY_LORA, SAFETENSORS_SUFFIXES,
         lambda written: save_file(tensors, written, lora.metadata), verify)


def _kind(group: Mapping[str, Any]) -> str | None:
    return _KINDS.get(frozenset(group.keys() - {"alpha", "dora_scale"}))


def _complete(group: Group, layer: str, said: Mapping[str, Any], swapped: bool) -> bool:
    """Bring ``group`` to the form that ComfyUI's loaders want; whether it is of a kind that is known.

    ``said`` is PEFT's configuration, ``layer`` the name of the layer in the file; ``swapped``: the halves of its rows
    are the other way round.
    """
    if _kind(group) is None or ("alpha" in group and group["alpha"].numel() != 1) or not all(
            tensor.is_floating_point() and tensor.ndim for name, tensor in group.items() if name != "alpha"):
        return False
    if (magnitude := group.get("dora_scale")) is not None and magnitude.ndim == 1:
        group["dora_scale"] = magnitude[:, None]
    if "alpha" not in group and "lora_down.weight" in group:
        patterns = said.get("alpha_pattern")
        alpha = next((alpha for end, alpha in (patterns.items() if isinstance(patterns, dict) else ())
                      if f".{layer}".endswith(f".{end}")), said.get("lora_alpha"))
        if isinstance(alpha, int | float) and math.isfinite(alpha):
            rank = len(group["lora_down.weight"])
            group["alpha"] = torch.tensor(float(alpha) * (math.sqrt(rank) if said.get("use_rslora") else 1))
    if swapped:
        for name in _OF_ROWS & group.keys():
            half, odd = divmod(len(group[name]), 2)
            if name.startswith("lokr") and odd:
                return False
            if len(group[name]) > 1:
                group[name] = torch.cat([group[name][half:], group[name][:half]])
    return True


def adapter(group: Mapping[str, Any]) -> Adapter | None:
    """The adapter of these tensors and ``alpha``, by ComfyUI's names for them, without its magnitudes; None if they are
    of no kind that is known."""
    def chain(*names: str) -> tuple[torch.Tensor, ...]:
        # Factors made for a convolution with a kernel of 1 x 1 are matrices, too.
        return tuple(group[name].flatten(min(1, group[name].ndim - 1)) for name in names if name in group)

    def scale(*names: str) -> float:
        rank = next((len(group[name]) for name in names if name in group), None)
        return float(group["alpha"]) / rank if rank and "alpha" in group else 1.0

    match _kind(group):
        case "LoRA":
            return Adapter("product", chain("lora_up.weight", "lora_down.weight"), scale=scale("lora_down.weight"))
        case "LoHa":
            return Adapter("hadamard", chain("hada_w1_a", "hada_w1_b"), chain("hada_w2_a", "hada_w2_b"),
                           scale("hada_w1_b"))
        case "LoKr":
            return Adapter("kronecker", chain("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
                           chain("lokr_w2", "lokr_w2_a", "lokr_w2_b"), scale("lokr_w2_b", "lokr_w1_b"))
        case "difference":
            return Adapter("product", (group["diff"],))
    return None


def _configuration(lora: Lora) -> dict[str, Any]:
    """PEFT's configuration: in the metadata, where diffusers writes it, or beside the file, where PEFT does."""
    if lora.path.name == "adapter_model.safetensors":
        return read_json(lora.path.parent / "adapter_config.json")
    return {key.removeprefix("transformer."): value for key, value in lora.said("lora_adapter_metadata").items()}
