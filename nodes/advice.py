"""Actionable messages for common first-graph mistakes: the wrong latent, the wrong text encoder, out of memory.

They begin with what to do: ComfyUI's error panel shows the first lines of a message.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..loaders import ModelFileError
from ..loaders.files import Stamps, refuse_changed

#: One latent position covers this many pixels in each direction.
_PIXELS = 16


@contextmanager
def action_first() -> Iterator[None]:
    """Raise ModelFileError as a ValueError that begins with the action. Before a message, ComfyUI shows the type of the
    error, twice, and with the path of its module unless that is ``builtins``."""
    try:
        yield
    except ModelFileError as error:
        found = str(error).removesuffix(f"; {error.action}.")
        raise ValueError(f"{error.action[:1].upper()}{error.action[1:]}; {found}.") from error


def check_files(patcher, stamps: Stamps) -> None:
    """Before the weights of ``patcher`` are copied or used, refuse files that changed since they were mapped."""
    def check(executor, *args, **kwargs):
        with action_first():
            refuse_changed(stamps)
        return executor(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "bonsai_image", check, patcher.model_options,
                         is_model_options=True)


def check_inputs(patcher, text_width: int) -> None:
    """Check the sampler's inputs before the first layer fails with an obscure shape error.

    ``text_width`` is the width of the conditioning that the model of ``patcher`` takes.
    """
    channels = patcher.model.latent_format.latent_channels

    def check(executor, x, timestep, context, y=None, guidance=None, ref_latents=None, *args, **kwargs):
        for latent, kind in ((x, "latent"), *((reference, "reference latent") for reference in ref_latents or ())):
            if latent.shape[1] != channels:
                raise ValueError("Use VAE Encode with the VAE of Bonsai Image, or Empty Flux 2 Latent; this "
                                 f"{kind} has {latent.shape[1]} channels, but Bonsai Image takes {channels}.")
        if context.shape[-1] != text_width:
            raise ValueError(f"Connect the CLIP of a Bonsai loader; this conditioning is {context.shape[-1]} wide, as "
                             f"another text encoder makes it, but Bonsai Image takes {text_width}.")

        def smaller() -> str:
            batch, width, height = x.shape[0], x.shape[3] * _PIXELS, x.shape[2] * _PIXELS
            size = f"Try a smaller size, such as {_half(width)} x {_half(height)}"
            return (f"{'Set batch_size to 1' if batch > 1 else size}, or start ComfyUI with --novram; out of memory at "
                    f"{width} x {height} with batch_size {batch}.")

        return _advising(executor, smaller)(x, timestep, context, y, guidance, ref_latents, *args, **kwargs)

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
        return ("Lower batch_size or the image size, use VAE Encode (Tiled) or VAE Decode (Tiled) with a tile_size of "
                f"256, or start ComfyUI with --cpu-vae; out of memory in the VAE{double}, even in tiles.")


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
