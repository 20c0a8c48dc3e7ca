"""Actionable messages for common first-graph mistakes: the wrong latent, the wrong text encoder, out of memory."""

from collections.abc import Callable

import comfy.model_management
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..loaders.files import Stamps, refuse_changed

#: One latent position covers this many pixels in each direction.
_PIXELS = 16


def check_files(patcher, stamps: Stamps) -> None:
    """Before the weights of ``patcher`` are copied or used, refuse files that changed since they were mapped."""
    def check(executor, *args, **kwargs):
        refuse_changed(stamps)
        return executor(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "bonsai_image", check, patcher.model_options,
                         is_model_options=True)


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


class AdvisingVAE(comfy.sd.VAE):
    """ComfyUI's VAE, with advice where even its own retry in tiles ran out of memory."""

    def encode(self, *args, **kwargs):
        return _advising(super().encode, self._advice)(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return _advising(super().decode, self._advice)(*args, **kwargs)

    def _advice(self) -> str:
        # On GPUs without BF16, ComfyUI computes the VAE in FP32.
        double = ", which takes twice the memory of BF16 on this GPU" if self.vae_dtype == torch.float32 else ""
        return (f"Out of memory in the VAE{double}, even in tiles; lower batch_size or the image size, use VAE Encode "
                "(Tiled) or VAE Decode (Tiled) with a tile_size of 256, or start ComfyUI with --cpu-vae.")


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
