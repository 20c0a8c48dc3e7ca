"""Actionable messages for common first-graph mistakes: the wrong latent, the wrong text encoder, out of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
from comfy.patcher_extension import PatcherInjection, WrappersMP

_KEY = "bonsai_image"
#: One latent position covers this many pixels in each direction.
_PIXELS = 16


def check_inputs(patcher, text_width: int) -> None:
    """Check the sampler's inputs before the first layer fails with an obscure shape error.

    ``text_width`` is the width of the conditioning that the model of ``patcher`` takes.
    """
    channels = patcher.model.latent_format.latent_channels

    def check(executor, x, timestep, context, *args, **kwargs):
        if x.shape[1] != channels:
            raise ValueError(f"This latent has {x.shape[1]} channels, but Bonsai Image takes {channels}; use Empty "
                             "Flux 2 Latent, or VAE Encode with the VAE of Bonsai Image.")
        if context.shape[-1] != text_width:
            raise ValueError(f"This conditioning is {context.shape[-1]} wide, but Bonsai Image takes {text_width}; it "
                             "comes from another model's text encoder, so connect the CLIP of a Bonsai loader.")
        try:
            return executor(x, timestep, context, *args, **kwargs)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            batch, width, height = x.shape[0], x.shape[3] * _PIXELS, x.shape[2] * _PIXELS
            smaller = f"try a smaller size, such as {_half(width)} x {_half(height)}"
            raise comfy.model_management.OOM_EXCEPTION(
                f"Out of memory at {width} x {height} with batch_size {batch}; "
                f"{'set batch_size to 1' if batch > 1 else smaller}, or start ComfyUI with --novram.") from error

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, check)


def on_out_of_memory(patcher, methods: tuple[str, ...], advice: str) -> None:
    """Re-raise out-of-memory errors of ``methods`` of the model of ``patcher`` with ``advice`` as the message.

    ComfyUI still recognises the error: it retries a VAE in tiles, and shows ``advice`` only if these fail too.
    """
    # Not an object patch: on a clone for another device it would still call the first model.
    def inject(patcher) -> None:
        for name in methods:
            method = getattr(patcher.model, name)
            if not isinstance(method, _Advising):
                setattr(patcher.model, name, _Advising(method, vars(patcher.model).get(name), advice))

    def eject(patcher) -> None:
        for name in methods:
            # A clone of the patcher may have ejected already.
            if isinstance(advising := vars(patcher.model).get(name), _Advising):
                delattr(patcher.model, name)
                if advising.before is not None:
                    setattr(patcher.model, name, advising.before)

    patcher.set_injections(f"{_KEY}_memory", [PatcherInjection(inject, eject)])


@dataclass(frozen=True)
class _Advising:
    """``method`` with ``advice`` for out of memory. ``before`` is the instance attribute it replaced, if any."""

    method: Callable
    before: Callable | None
    advice: str

    def __call__(self, *args, **kwargs):
        try:
            return self.method(*args, **kwargs)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            raise comfy.model_management.OOM_EXCEPTION(self.advice) from error


def _half(side: int) -> int:
    """The side of half the area, rounded down to whole latent positions; both in pixels."""
    return max(_PIXELS, int(side * 0.7) // _PIXELS * _PIXELS)
