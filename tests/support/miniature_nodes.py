"""A custom node for ComfyUI that makes every loader of the example workflows load the trained miniature: its MODEL in
ComfyUI, its text encoder and VAE, for which ComfyUI's sizes are fixed, in diffusers.
"""

import functools

import torch
from comfy_api.latest import io
from server import PromptServer

import nodes
from bonsai_image.miniature import demo
from bonsai_image.nodes import models
from bonsai_image.tests.support.miniature_in_comfyui import Ends, unpadded

NODE_CLASS_MAPPINGS = {}
ends = functools.cache(Ends)


class Clip:
    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        return [[ends().encode([text]), {}]]


class VAE:
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (ends().decode(latent).movedim(1, -1) + 1) / 2

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return ends().latent(pixels.movedim(-1, 1) * 2 - 1)


def model(variant: str = "ternary"):
    return unpadded(models.load_model(str(demo.MINIATURE / demo.VARIANTS[variant]), "fp32"),
                    ends().encode(["a"]).shape[1])


def exchange(request: dict) -> dict:
    """Before a prompt runs, when every pack has been loaded."""
    classes = nodes.NODE_CLASS_MAPPINGS
    for name, parts in (("BonsaiCheckpointLoader", (model, Clip, VAE)), ("BonsaiModelLoader", (model,)),
                        ("BonsaiTextEncoderLoader", (Clip,))):
        def execute(cls, parts=parts, model_name="", **_):
            named = ("binary",) if "binary" in model_name else ()
            return io.NodeOutput(*(part(*named) for part in parts))
        classes[name].execute = classmethod(execute)
    classes["VAELoader"].load_vae = lambda self, **_: (VAE(),)
    classes["CLIPLoader"].load_clip = lambda self, **_: (Clip(),)
    return request


PromptServer.instance.add_on_prompt_handler(exchange)
