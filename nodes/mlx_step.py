"""Allow-list of ComfyUI features that the MLX transformer reproduces; anything else is left to ComfyUI's forward."""

from collections.abc import Collection, Mapping
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


def refusal(options: Mapping[Any, Any], inputs: Mapping[str, Any], patched: int, changed: Collection[str] = (),
            hooks: bool = False, managed: bool = False, gradient: bool = False) -> str | None:
    """Why ComfyUI's own forward has to run a step, or None if the MLX transformer can.

    ``options``: ComfyUI's ``transformer_options``. ``inputs``: what the model is given besides image, text, timestep
    and reference latents, by name; None means not given. ``patched``: how many weights carry a patch (LoRA, merge).
    ``changed``: names of layers with a weight function, a hook or a replaced forward. ``hooks``: whether prompt hooks
    are active. ``managed``: whether weights move while the model runs. ``gradient``: whether one is needed.
    """
    active = [f"{name} ({kind})" for name in PATCH_OPTIONS
              for kind, functions in options.get(name, {}).items() if functions]
    unknown_options = [str(name) for name in options if name not in HARMLESS_OPTIONS and name not in PATCH_OPTIONS]
    unknown_inputs = [name for name, value in inputs.items() if value is not None and name not in HARMLESS_INPUTS]
    reasons = {
        f"patches on {patched} weights (LoRA or merge)": patched,
        f"a changed layer ({min(changed, default=None)})": changed,
        "active hooks": hooks,
        "weights that move while the model runs (dynamic VRAM)": managed,
        "a gradient to compute": gradient,
        min(active, default=""): active,
        f"the transformer option {min(unknown_options, default=None)}": unknown_options,
        f"the model input {min(unknown_inputs, default=None)}": unknown_inputs,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
