"""LoRA beside the codes: patches on a weight become side paths of its layer, and the weight never changes.

ComfyUI's loaders put patches into ``patcher.patches`` (and, for scheduled LoRA, ``patcher.hook_patches``). At every
load of the model, and whenever hooks come or go, :func:`attach` turns them into side paths (``nodes/side_paths.py``).
The few dense linears of the model are treated alike: their BF16 weights would round a LoRA away in part.
"""

import logging

import comfy.hooks
import comfy.model_management
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP, add_wrapper_with_key

from .operations import HostEmbedding, HostLayer
from .side_paths import Adapters, factors, fits, side_paths

#: The key of the injection and the wrapper.
_KEY = "bonsai_image_lora"


def attach(patcher, loading: bool = False) -> None:
    """Give every layer of ``patcher``'s model the side paths of the patches and hooks in force.

    Only if the model is loaded with the patches of ``patcher``: clones share the model, and ComfyUI also runs the
    injection of a clone that it has just given a LoRA, while another one is sampling. A layer without adapters gets
    them only during a load (``loading``): ComfyUI also runs injections after a load that failed.
    """
    drop_misfits(patcher)
    if not loading and patcher.model.current_weight_patches_uuid != patcher.patches_uuid:
        return
    hook_patches = patcher.get_combined_hook_patches(patcher.current_hooks)
    device = patcher.load_device
    for name, layer in patcher.model.named_modules():
        if isinstance(layer, HostLayer) and (loading or layer.adapters is not None):
            key = f"{name}.weight"
            patches = (*patcher.patches.get(key, ()), *hook_patches.get(key, ()))
            # Called several times per prompt; skip unchanged layers.
            if layer.adapters is None or not layer.adapters.made_for(device, patches):
                paths = side_paths(patches, key, device, isinstance(layer, HostEmbedding))
                layer.adapters = Adapters(device, patches, paths)
            # Under dynamic VRAM, ComfyUI has also left the patch here, to merge it into the weight.
            layer.weight_lowvram_function = None
    if loading:
        count(patcher)


def drop_misfits(patcher) -> None:
    """Take the patches off ``patcher`` that do not fit their weights, and say so in one sentence.

    ComfyUI would itself try each of them at every load, log an error for each, and go on.
    """
    layers, dropped = dict(patcher.model.named_modules()), []
    for by_key in (patcher.patches, *patcher.hook_patches.values()):
        for key, patches in list(by_key.items()):
            layer = layers.get(key.removesuffix(".weight"))
            if not isinstance(layer, HostLayer):
                continue
            fitting = [patch for patch in patches if fits(patch, layer.loaded_weight().shape)]
            if len(fitting) < len(patches):
                dropped.append(key)
                by_key[key] = fitting
                if not fitting:
                    del by_key[key]
    if dropped:
        logging.warning("Bonsai Image: a LoRA has no effect on %d weights, which have another shape in this model "
                        "(first: %s); choose one made for FLUX.2 Klein 4B.", len(dropped), dropped[0])


def attached(patcher) -> str | None:
    """What changes the weights of ``patcher``, or the results of its layers; None if nothing does."""
    functions = [function for layer in patcher.model.modules() for name in ("weight_function", "bias_function")
                 for function in getattr(layer, name, ()) if not getattr(function, "is_lowvram_patch", False)]
    found = {"a LoRA or merge": patcher.patches, "a LoRA hook": patcher.hook_patches or patcher.forced_hooks,
             f"an injection ({min(patcher.injections.keys() - {_KEY}, default='')}), as by Load LoRA (Bypass),":
                 patcher.injections.keys() - {_KEY},
             "a weight function": patcher.weight_wrapper_patches or functions}
    return next((name for name, there in found.items() if there), None)


def detach(patcher, unpatch_all: bool) -> None:
    """Drop all side paths, and with them the adapters they hold, when ComfyUI takes its patches off the weights."""
    # Without unpatch_all, ComfyUI only forgets that the model is loaded; it may go on without another load.
    if unpatch_all:
        for layer in patcher.model.modules():
            if isinstance(layer, HostLayer):
                layer.adapters = None


def count(patcher) -> None:
    """Count the factors of ``patcher``'s adapters, which :func:`attach` copies to the device, in its size in bytes.

    Those of hooks all count, though not all of them need be in force at once.
    """
    adapters = sum(tensor.nbytes for by_key in (patcher.patches, *patcher.hook_patches.values())
                   for patches in by_key.values() for _, value, *_ in patches for tensor in factors(value))
    patcher.size = comfy.model_management.module_size(patcher.model) + adapters


def _count_first(executor, patcher, *args, **kwargs):
    drop_misfits(patcher)
    count(patcher)
    return executor(patcher, *args, **kwargs)


def install(patcher) -> None:
    """Keep the side paths of ``patcher`` and of its clones in step with ComfyUI."""
    # During the load, so that ComfyUI rolls back a model whose adapters do not fit.
    patcher.add_callback(CallbacksMP.ON_LOAD, lambda patcher, *_: attach(patcher, loading=True))
    # ComfyUI re-runs injections after every change of patches or hooks.
    patcher.set_injections(_KEY, [PatcherInjection(attach, lambda patcher: None)])
    patcher.add_callback(CallbacksMP.ON_DETACH, detach)
    # Before ComfyUI makes room for the model: it asks for the size, and loads, inside.
    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, _count_first, patcher.model_options, is_model_options=True)
    # MaxSpeed caches dense weights and copies them back, which packed weights do not support.
    patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
