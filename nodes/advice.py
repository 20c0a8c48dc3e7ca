"""Errors that teach: what goes wrong for many in a first graph, each in one sentence with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
from comfy.patcher_extension import PatcherInjection, WrappersMP

_KEY = "bonsai_image"
#: Pixels along each side of one position of the latent.
_PATCH = 16


def install(patcher, text_width: int) -> None:
    """Check what the sampler hands to the model of ``patcher`` before its first layer does, with less to say.

    ``text_width`` is the width of the conditioning that the model takes.
    """
    channels = patcher.model.latent_format.latent_channels

    def check(executor, x, timestep, context, *args, **kwargs):
        if x.shape[1] != channels:
            raise ValueError(f"This latent has {x.shape[1]} channels, Bonsai Image takes {channels}: use Empty Flux 2 "
                             "Latent, or VAE Encode with the VAE of Bonsai Image.")
        if context.shape[-1] != text_width:
            raise ValueError(f"This conditioning is {context.shape[-1]} wide, Bonsai Image takes {text_width}: it "
                             "comes from the text encoder of another model, so connect the CLIP of a Bonsai loader.")
        try:
            return executor(x, timestep, context, *args, **kwargs)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            batch, width, height = x.shape[0], x.shape[3] * _PATCH, x.shape[2] * _PATCH
            raise comfy.model_management.OOM_EXCEPTION(
                f"Out of memory while drawing {batch} at once of {width} x {height}: lower "
                f"{'batch_size to 1' if batch > 1 else f'the size, for example to {_half(width)} x {_half(height)}'}, "
                "or start ComfyUI with --novram.") from error

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, check)


def name_out_of_memory(patcher, methods: tuple[str, ...], advice: str) -> None:
    """Where one of ``methods`` of the model of ``patcher`` runs out of memory, say ``advice``.

    The host still sees that memory ran out: a VAE is tried again in tiles, and ``advice`` is read if these fail too.
    """
    # Not an object patch: those of a clone for another device would call the first model.
    def inject(patcher) -> None:
        for name in methods:
            method = getattr(patcher.model, name)
            if not isinstance(method, _Advising):
                setattr(patcher.model, name, _Advising(method, vars(patcher.model).get(name), advice))

    def eject(patcher) -> None:
        for name in methods:
            # A clone of the patcher may have been here before.
            if isinstance(advising := vars(patcher.model).get(name), _Advising):
                delattr(patcher.model, name)
                if advising.before is not None:
                    setattr(patcher.model, name, advising.before)

    patcher.set_injections(f"{_KEY}_memory", [PatcherInjection(inject, eject)])


@dataclass(frozen=True)
class _Advising:
    """``method`` of a model, with ``advice`` for out of memory. ``before``: what somebody else had put in its place."""

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
    """A side for half the area, in whole positions of the latent."""
    return max(_PATCH, int(side * 0.7) // _PATCH * _PATCH)
