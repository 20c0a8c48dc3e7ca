"""Whether the MLX transformer may take one step of a host: only when it would honour everything in it.

This is the table of what it honours. Everything not in it is declined, and the host's own forward takes the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

#: ``transformer_options`` that name or time a step without changing what the model computes. ``rope_options`` does
#: change it, but through the position ids, which the host makes. Wrappers run around either path.
HARMLESS_OPTIONS = frozenset((
    "callbacks", "cond_or_uncond", "multigpu_thread_device", "prefetch_dynamic_vbars", "reference_image_num_tokens",
    "rope_options", "sample_sigmas", "sigmas", "uuids", "wrappers",
))

#: ``transformer_options`` that hold functions to call inside the model, harmless while empty.
PATCH_OPTIONS = ("patches", "patches_replace")

#: Inputs that the host's own FLUX.2 Klein ignores (it has neither a pooled text input nor a guidance embedding), or
#: that only say where the host places reference latents.
HARMLESS_INPUTS = frozenset(("guidance", "ref_latents_method", "y"))


@dataclass(frozen=True)
class Step:
    """The facts of one step.

    ``options``: the host's ``transformer_options``. ``inputs``: names of what the model is given (not None) besides
    image, text, timestep and reference latents. ``patched``: how many weights carry a patch (LoRA, merge).
    ``changed``: names of layers with a weight function, a hook or a replaced forward. ``hooks``: whether prompt hooks
    are active. ``managed``: whether weights move while the model runs. ``gradient``: whether one is asked for.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Collection[str] = ()
    patched: int = 0
    changed: Collection[str] = ()
    hooks: bool = False
    managed: bool = False
    gradient: bool = False


def refusal(step: Step) -> str | None:
    """Why the MLX transformer leaves ``step`` to the host, or None."""
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
