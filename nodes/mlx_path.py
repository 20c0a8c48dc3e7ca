"""The MLX transformer in a wrapper of ComfyUI's diffusion model, so that MODEL stays ComfyUI's own.

The wrapper runs a step in MLX only if ``nodes/mlx_step.py`` allows everything in it. ComfyUI's own ``Flux._forward``
prepares tokens, position ids and reference latents; it runs on a copy of the model whose ``forward_orig`` is MLX.
Importing this module imports MLX.
"""

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Iterator

import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..networks import klein_mlx as mlx_klein
from ..ops.backends import libraries
from ..ops.backends.mlx import backend as mlx_backend
from ..ops.packed import is_packed, unwrap
from .mlx_step import refusal

#: The key of the wrapper and the callbacks.
_KEY = "bonsai_image_mlx"

#: The methods of ``Flux`` that one step runs; other node packs tend to replace them.
_METHODS = ("forward", "_forward", "forward_orig", "process_img")


def install(patcher) -> "MlxPath":
    """Run the steps of ``patcher``, a freshly loaded MODEL of FLUX.2 Klein, and of its clones in MLX where possible."""
    path = MlxPath(patcher.model)
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, path)
    # Free the memory of the activations after sampling: the VAE comes next.
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, lambda _: mlx_backend.clear_cache())
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, path.detached)
    return path


class MlxPath:
    """The wrapper of one model: its weights in MLX, and which path ran its steps.

    ``declined`` is why the last step was left to ComfyUI, or None; ``steps`` counts the steps of each path. The weights
    are made at the first step, and again after ComfyUI has moved or replaced a tensor. Where memory is shared, they are
    ComfyUI's own tensors.
    """

    def __init__(self, model):
        self._model = weakref.ref(model)
        self._names = dict(model.diffusion_model.named_parameters()).keys()
        self._tensors: dict[str, torch.Tensor] = {}
        self._dtype: torch.dtype | None = None
        self._weights: dict = {}
        self.declined: str | None = None
        self._failed: str | None = None
        self.steps: Counter[str] = Counter()

    def __call__(self, executor, *args, **kwargs):
        """The wrapper. Further wrappers run inside it, around whichever path runs the step."""
        if torch.compiler.is_compiling():  # torch.compile of the whole model cannot trace MLX
            self.declined = "torch.compile"
            return executor(*args, **kwargs)
        flux = executor.class_obj
        forward = functools.partial(self._take, flux, executor.original)
        inner = type(executor).new_class_executor(forward, flux, executor.wrappers, executor.idx + 1)
        return inner.execute(*args, **kwargs)

    def _take(self, flux, original, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
              transformer_options=None, **kwargs):
        options = transformer_options or {}
        self.declined = self._why_not(flux, x, options, {"y": y, "guidance": guidance, "control": control, **kwargs})
        forward = original
        if self.declined is None:
            stand_in = copy.copy(flux)
            stand_in.forward_orig = functools.partial(self._transformer, flux)
            forward = stand_in._forward
        result = forward(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)
        self.steps["MLX" if self.declined is None else "ComfyUI"] += 1
        return result

    def _why_not(self, flux, x: torch.Tensor, options: dict, inputs: dict) -> str | None:
        model = self._model()
        if model is None or model.diffusion_model is not flux or model.current_patcher is None:
            return "a run outside the loaded MODEL"
        patcher = model.current_patcher
        changed = [*_changed_layers(flux), *self._names ^ dict(flux.named_parameters()).keys(),
                   *(key for key in patcher.object_patches if key.startswith("diffusion_model"))]
        return self._failed or refusal(options, inputs, len(patcher.patches), changed,
                                       hooks=patcher.current_hooks is not None, managed=patcher.is_dynamic(),
                                       gradient=torch.is_grad_enabled() and x.requires_grad)

    def _transformer(self, flux, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None,
                     transformer_options=None, **inputs):
        """``Flux.forward_orig``. ``Flux._forward`` may have added inputs, so they are checked here too."""
        original = functools.partial(flux.forward_orig, img, img_ids, txt, txt_ids, timesteps, y, guidance, control,
                                     transformer_options=transformer_options, **inputs)
        self.declined = refusal({}, inputs, patched=0)
        if self.declined is not None:
            return original()
        eps = flux.double_blocks[0].img_attn.norm.query_norm.eps
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        with libraries.contained(libraries.MLX, "fails in a step of the whole transformer"):
            return mlx_klein.step(self.weights(flux, img.dtype), img, img_ids[0], txt, txt_ids[0], timesteps, eps,
                                  flux.params.axes_dim, flux.params.theta, after_block=comfy.ops.run_every_op)
        self._drop()
        self.declined = self._failed = "a failure of MLX (see the log)"
        return original()

    def weights(self, flux, dtype: torch.dtype) -> dict:
        """The weights of ``flux`` in MLX for activations of ``dtype``."""
        tensors = dict(flux.named_parameters())
        if dtype != self._dtype or any(tensor is not self._tensors.get(name) for name, tensor in tensors.items()):
            self._drop()
            self._weights = mlx_klein.load(tensors, dtype)
            self._tensors, self._dtype = tensors, dtype
        return self._weights

    def detached(self, _patcher, unpatched: bool) -> None:
        """ComfyUI unloads the model, or (not ``unpatched``) hands it from one clone to the next."""
        if unpatched:
            self._drop()

    def _drop(self) -> None:
        self._tensors, self._weights, self._dtype = {}, {}, None
        mlx_backend.clear_cache()

    def describe(self, patcher) -> str:
        """Which path runs the steps, and why."""
        taken = " and ".join(f"{count} in {path}" for path, count in sorted(self.steps.items()))
        note = f"last step; {taken} so far" if taken else "no step counted yet"
        declined = self.declined
        if declined is None and not self.steps:
            declined = refusal({}, {}, len(patcher.patches), managed=patcher.is_dynamic())
        if declined is None:
            return f"whole transformer in MLX ({note})"
        return f"ComfyUI's transformer with MLX in each packed layer, because of {declined} ({note})"


def _changed_layers(flux) -> Iterator[str]:
    """Names of the methods and layers of ``flux`` that no longer compute what was loaded."""
    yield from (name for name in _METHODS if getattr(flux, name).__module__ != Flux.__module__)
    for name, module in flux.named_modules():
        adapters = getattr(module, "adapters", None)
        changes = (*getattr(module, "weight_function", ()), *getattr(module, "bias_function", ()),
                   *(adapters.paths if adapters else ()), *module._forward_hooks, *module._forward_pre_hooks)
        weight = getattr(module, "weight", None)
        if changes or "forward" in vars(module) or (is_packed(weight) and not mlx_backend.takes(unwrap(weight))):
            yield name
