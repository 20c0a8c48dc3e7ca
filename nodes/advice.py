"""Actionable messages for common first-graph mistakes: the wrong latent, the wrong text encoder, out of memory."""

from collections.abc import Callable

import comfy.model_management
from comfy.patcher_extension import WrappersMP

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

        def smaller() -> str:
            batch, width, height = x.shape[0], x.shape[3] * _PIXELS, x.shape[2] * _PIXELS
            size = f"try a smaller size, such as {_half(width)} x {_half(height)}"
            return (f"Out of memory at {width} x {height} with batch_size {batch}; "
                    f"{'set batch_size to 1' if batch > 1 else size}, or start ComfyUI with --novram.")

        return _advising(executor, smaller)(x, timestep, context, *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bonsai_image", check)


def on_out_of_memory(patcher, methods: tuple[str, ...], advice: str) -> None:
    """Re-raise out-of-memory errors of ``methods`` of the model of ``patcher`` with ``advice`` as the message.

    ComfyUI still recognises the error: it retries a VAE in tiles, and shows ``advice`` only if these fail too.
    """
    # A class of its own for this one model: an object patch would still call the first model from a clone on another
    # device, and a bound method kept in the model would keep it alive.
    kind = type(patcher.model)
    advising = {name: _advising(getattr(kind, name), lambda: advice) for name in methods}
    patcher.model.__class__ = type(kind.__name__, (kind,), advising)


def _advising(function: Callable, advice: Callable[[], str]) -> Callable:
    """``function`` with ``advice()`` as the message of out of memory."""
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            raise comfy.model_management.OOM_EXCEPTION(advice()) from error

    return call


def _half(side: int) -> int:
    """The side of half the area, rounded down to whole latent positions; both in pixels."""
    return max(_PIXELS, int(side * 0.7) // _PIXELS * _PIXELS)
