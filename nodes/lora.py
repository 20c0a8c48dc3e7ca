"""LoRA beside the codes: what the host attaches to a linear's weight is added to the product, never to the weight.

The host's loaders put patches into ``patcher.patches`` (and, for scheduled LoRA, ``patcher.hook_patches``). At every
load of the model, and whenever hooks come or go, :func:`attach` turns them into side paths, which it hands to the
Linears. A plain LoRA (also a LoCon one on a linear) and a LoKr stay in factored form; every other kind (DoRA, LoHa,
GLoRA, OFT, BOFT, plain differences, merges) becomes the difference it makes to this one weight, computed in FP32 by the
host's own code each time it is needed, and is multiplied beside the weight as well. The few dense linears of the model
are treated alike: their BF16 weights would round a LoRA away in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.weight_adapter
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from torch.nn.functional import linear

from ..ops.packed import is_packed
from .operations import HostLinear

#: (strength, value, strength of the weight itself, offset or None, function or None), as ``ModelPatcher`` stores them.
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]

#: The device and the patches that side paths were made for.
Attached = tuple[torch.device, tuple[Patch, ...]]


@dataclass(frozen=True)
class LowRank:
    """LoRAs on one weight: ``y[..., rows] += (x @ down.T * scale)[..., part] @ up.T`` for each of ``ups``.

    ``down`` ``(R, K)`` stacks the ranks of all; ``scale`` ``(R,)`` float32 is strength * alpha / rank for each of them.
    ``ups`` holds (first row, number of rows, first rank, ``up`` (rows, ranks)).
    """

    down: torch.Tensor
    scale: torch.Tensor
    ups: tuple[tuple[int, int, int, torch.Tensor], ...]

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden = linear(x, self.down.to(x.dtype)) * self.scale.to(x.dtype)
        flat, hidden = y.view(-1, y.shape[-1]), hidden.view(-1, hidden.shape[-1])
        for row, rows, rank, up in self.ups:
            flat[:, row : row + rows].addmm_(hidden[:, rank : rank + up.shape[1]], up.to(x.dtype).t())
        return y


@dataclass(frozen=True)
class Kronecker:
    """One LoKr over all of a weight, applied by the host's own ``h``."""

    adapter: comfy.weight_adapter.LoKrAdapter
    strength: float

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y.add_(self.adapter.h(x, y), alpha=self.strength)


@dataclass(frozen=True)
class Difference:
    """Patches of any kind: the host computes the patched weight from a dense copy, and the difference is multiplied."""

    patches: tuple[Patch, ...]
    key: str

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dense = weight.to(dtype=torch.float32).dequantize() if is_packed(weight) else weight.float()
        originals = {self.key: [(dense, None)]}
        patched = comfy.lora.calculate_weight(list(self.patches), dense.clone(), self.key, torch.float32, originals)
        if patched.shape != dense.shape:
            raise ValueError(f"A LoRA changes the shape of {self.key} from {tuple(dense.shape)} to "
                             f"{tuple(patched.shape)}, which this model cannot follow; remove that LoRA.")
        return y.add_(linear(x, patched.sub_(dense).to(x.dtype)))


def _is_plain_lora(patch: Patch, shape: torch.Size) -> bool:
    _, value, strength_model, offset, function = patch
    if strength_model != 1.0 or function is not None or not isinstance(value, comfy.weight_adapter.LoRAAdapter):
        return False
    up, down, _, mid, dora, reshape = value.weights
    rows = shape[0] if offset is None else offset[2]
    return (mid is None and dora is None and reshape is None and (offset is None or offset[0] == 0)
            and up.flatten(1).shape == (rows, down.shape[0]) and down.flatten(1).shape[1] == shape[1])


def _is_plain_lokr(patch: Patch) -> bool:
    _, value, strength_model, offset, function = patch
    if (strength_model != 1.0 or offset is not None or function is not None
            or not isinstance(value, comfy.weight_adapter.LoKrAdapter)):
        return False
    w1, w2, _, w1_a, w1_b, w2_a, w2_b, tucker, dora = value.weights
    matrices = all(part is None or part.ndim == 2 for part in (w1, w2, w1_a, w1_b, w2_a, w2_b))
    # With both factors decomposed, the host divides alpha by different ranks in its two ways to apply a LoKr.
    same_rank = w1 is not None or w2 is not None or w1_b.shape[0] == w2_b.shape[0]
    return tucker is None and dora is None and matrices and same_rank


def _low_rank(patches: Sequence[Patch], shape: torch.Size, device: torch.device) -> LowRank:
    downs, scales, ups, rank = [], [], [], 0
    for strength, adapter, _, offset, _ in patches:
        up, down, alpha = adapter.weights[:3]
        down = down.flatten(1).to(device)
        row, rows = (0, shape[0]) if offset is None else offset[1:]
        downs.append(down)
        ups.append((row, rows, rank, up.flatten(1).to(device)))
        scales.append(torch.full((len(down),), strength * (1.0 if alpha is None else alpha / len(down))))
        rank += len(down)
    dtype = torch.float32 if len({down.dtype for down in downs}) > 1 else downs[0].dtype
    return LowRank(torch.cat([down.to(dtype) for down in downs]), torch.cat(scales).to(device), tuple(ups))


def side_paths(patches: Sequence[Patch], key: str, shape: torch.Size, device: torch.device) -> tuple:
    """The side paths, in order, that add the effect of ``patches`` on the weight ``key`` of ``shape``."""
    if all(_is_plain_lora(patch, shape) for patch in patches):
        return (_low_rank(patches, shape, device),) if patches else ()
    if all(_is_plain_lora(patch, shape) or _is_plain_lokr(patch) for patch in patches):
        loras = [patch for patch in patches if _is_plain_lora(patch, shape)]
        kroneckers = tuple(Kronecker(_moved(patch[1], device), patch[0]) for patch in patches
                           if not _is_plain_lora(patch, shape))
        return (*((_low_rank(loras, shape, device),) if loras else ()), *kroneckers)
    return (Difference(tuple(patches), key),)


def _moved(adapter, device: torch.device):
    weights = tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in adapter.weights)
    return type(adapter)(adapter.loaded_keys, weights)


def attach(patcher, loading: bool = False) -> None:
    """Give every Linear of ``patcher``'s model the side paths of the patches and hooks in force.

    Only while the host is ``loading`` the model does a Linear without any begin to have some: the host asks after a
    load that failed as well.
    """
    hook_patches = patcher.get_combined_hook_patches(patcher.current_hooks)
    device = patcher.load_device
    for name, module in patcher.model.named_modules():
        if isinstance(module, HostLinear) and (loading or module.attached is not None):
            key = f"{name}.weight"
            patches = (*patcher.patches.get(key, ()), *hook_patches.get(key, ()))
            # The host asks for this several times a prompt.
            if not _same((device, patches), module.attached):
                module.side_paths = side_paths(patches, key, module.weight.shape, device)
                module.attached = device, patches
            # Under dynamic VRAM the host has left the patch here, to merge it into the weight.
            module.weight_lowvram_function = None


def _same(one: Attached, other: Attached | None) -> bool:
    # Equal is no question for tensors; patches are never changed in place.
    return (other is not None and one[0] == other[0] and len(one[1]) == len(other[1])
            and all(a is b for a, b in zip(one[1], other[1], strict=True)))


def detach(patcher, unpatch_all: bool) -> None:
    """Drop all side paths, and with them the adapters they hold, when the host takes its patches off the weights."""
    # Without unpatch_all the host only forgets that the model is loaded; it may go on without another load.
    if unpatch_all:
        for module in patcher.model.modules():
            if isinstance(module, HostLinear):
                module.side_paths, module.attached = (), None


def install(patcher) -> None:
    """Keep the side paths of ``patcher`` and of its clones in step with the host."""
    # Inside the load, so that the host takes back a model for whose adapters there is no memory.
    patcher.add_callback(CallbacksMP.ON_LOAD, lambda patcher, *_: attach(patcher, loading=True))
    # An injection is what the host puts back after whatever it does to patches and hooks.
    patcher.set_injections("bonsai_image_lora", [PatcherInjection(attach, lambda patcher: None)])
    patcher.add_callback(CallbacksMP.ON_DETACH, detach)
    # The other mode caches dense weights, which a packed one cannot take back.
    patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
