"""A LoRA beside packed layers of diffusers' transformer: computed next to the packed product, never merged into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..loaders import ModelFileError

_PREFIX, _DOWN, _UP = "transformer.", ".lora_A.weight", ".lora_B.weight"


def load(path: Path, transformer: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (down ``(rank, in)``, up ``(out, rank)``) by module, in the transformer's dtype and on its device.

    Reads what diffusers converts: its own names, kohya's and ai-toolkit's. Raises ModelFileError.
    """
    def refuse(found: str) -> ModelFileError:
        return ModelFileError(path, "a LoRA for FLUX.2 Klein 4B", found, "choose another LoRA")

    try:
        tensors = Flux2KleinPipeline.lora_state_dict(load_file(path))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise refuse(str(error)) from error
    pairs = {}
    for key in [key for key in tensors if key.endswith(_DOWN)]:
        layer = key.removesuffix(_DOWN)
        down, up, alpha = tensors.pop(key), tensors.pop(f"{layer}{_UP}", None), tensors.pop(f"{layer}.alpha", None)
        try:
            module = transformer.get_submodule(layer.removeprefix(_PREFIX))
        except AttributeError:
            raise refuse(f"a layer {layer} that the model lacks") from None
        shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if up is None or down.ndim != 2 or (*up.shape[:1], *down.shape[1:]) != shape or up.shape[1:] != down.shape[:1]:
            raise refuse(f"tensors of {layer} that do not fit a layer of {shape}")
        if alpha is not None:
            up = up * (alpha.item() / len(down))
        pairs[layer.removeprefix(_PREFIX)] = tuple(part.to(transformer.device, transformer.dtype)
                                                   for part in (down, up))
    if tensors or not pairs:
        raise refuse(f"{min(tensors)}, which is not of a LoRA" if tensors else "no LoRA layers")
    return pairs


@contextmanager
def applied(transformer: torch.nn.Module, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
            strength: float) -> Iterator[None]:
    """Adds ``strength * up(down(x))`` to the output of every layer in ``pairs``."""
    def hook(down: torch.Tensor, up: torch.Tensor):
        return lambda module, args, output: output + (args[0] @ down.T @ up.T) * strength

    hooks = [transformer.get_submodule(layer).register_forward_hook(hook(*pair)) for layer, pair in pairs.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
