"""Encoding a prompt in ComfyUI: its progress, and the last one remembered while nothing about it changes."""

import json
import weakref

import comfy.utils


def show_progress(clip) -> None:
    """Move the progress bar of the running node with every layer of the text encoder of ``clip``."""
    model = clip.cond_stage_model
    layers = getattr(model, model.clip).transformer.model.layers
    bars = []  # the one of the pass that is running

    def begin(*_) -> None:
        bars[:] = [comfy.utils.ProgressBar(len(layers))]

    layers[0].register_forward_pre_hook(begin)
    for layer in layers:
        layer.register_forward_hook(lambda *_: bars[0].update(1))


def remember_prompt(clip) -> None:
    """Make ``clip`` return the conditioning of its last prompt again where ComfyUI encodes the same one, as it does
    whenever an input of the loader changes. A clone, which may have a LoRA or another setting, encodes as ever."""
    # The method of the class and a weak reference: ``clip`` must not hold itself, or it would outlive its last user.
    encode, itself, last = type(clip).encode_from_tokens_scheduled, weakref.proxy(clip), {}

    def encode_from_tokens_scheduled(tokens, **options):
        try:
            key = json.dumps([tokens, options, itself.layer_idx, str(itself.patcher.patches_uuid)])
        except TypeError:  # an embedding among the tokens, or hooks: tensors and objects
            return encode(itself, tokens, **options)
        if key not in last:
            found = encode(itself, tokens, **options)
            last.clear()
            last[key] = found
        # Callers may change what holds the tensors.
        return [[tensor, dict(more)] for tensor, more in last[key]]

    clip.encode_from_tokens_scheduled = encode_from_tokens_scheduled
