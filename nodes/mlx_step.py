"""Allow-list of ComfyUI features that the MLX transformer reproduces; anything else is left to ComfyUI's forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

#: ``transformer_options`` that name or time a step without changing what the model computes. ``rope_options`` does
#: change it, but through the position ids, which ComfyUI makes. Wrappers run around either path.
HARMLESS_OPTIONS = frozenset((
    "callbacks", "cond_or_uncond", "multigpu_thread_device", "prefetch_dynamic_vbars", "reference_image_num_tokens",
    "rope_options", "sample_sigmas", "sigmas", "uuids", "wrappers",
))

#: ``transformer_options`` that hold functions to call inside the model, harmless while empty.
PATCH_OPTIONS = ("patches", "patches_replace")

#: Inputs that ComfyUI's own FLUX.2 Klein ignores (it has neither a pooled text input nor a guidance embedding), or
#: that only say where ComfyUI places reference latents.
HARMLESS_INPUTS = frozenset(("guidance", "ref_latents_method", "y"))


@dataclass(frozen=True)
class Step:
    """What decides which path runs one step.

    ``options``: ComfyUI's ``transformer_options``. ``inputs``: names of what the model is given (not None) besides
    image, text, timestep and reference latents. ``patched``: how many weights carry a patch (LoRA, merge).
    ``changed``: names of layers with a weight function, a hook or a replaced forward. ``hooks``: whether prompt hooks
    are active. ``managed``: whether weights move while the model runs. ``gradient``: whether one is needed.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Collection[str] = ()
    patched: int = 0
    changed: Collection[str] = ()
    hooks: bool = False
    managed: bool = False
    gradient: bool = False


def refusal(step: Step) -> str | None:
    """Why ComfyUI's own forward has to run ``step``, or None if the MLX transformer can."""
    if step.patched:
        return f"patches on {step.patched} weights (LoRA or merge)"
    if step.changed:
        return f"a changed layer ({min(step.changed)})"
    if step.hooks:
        return "active hooks"
    if step.managed:
        return "weights that move while the model runs (dynamic VRAM)"
    if step.gradient:
        return "a gradient to compute"
    for name in PATCH_OPTIONS:
        kinds = [str(kind) for kind, functions in step.options.get(name, {}).items() if functions]
        if kinds:
            return f"{name} ({min(kinds)})"
    unknown = [str(name) for name in step.options if name not in HARMLESS_OPTIONS and name not in PATCH_OPTIONS]
    if unknown:
        return f"the transformer option {min(unknown)}"
    unknown = [name for name in step.inputs if name not in HARMLESS_INPUTS]
    if unknown:
        return f"the model input {min(unknown)}"
    return None
