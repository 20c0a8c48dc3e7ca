"""Faults that a GPU would let pass or punish, planted one at a time: each must show in the record of its case."""

import dataclasses

import comfy.model_management as management
import comfy.ops
import comfy_aimdo.model_vbar
import pretended_gpu
import torch


def scale_on_the_cpu(_model) -> None:
    cast = comfy.ops.cast_bias_weight

    def broken(*arguments, **options):
        weight, *rest = cast(*arguments, **options)
        if hasattr(weight, "_params"):
            scale = torch.ones(weight._params.scale.shape, dtype=weight._params.scale.dtype)
            weight = type(weight)(weight._qdata, weight._layout_cls, dataclasses.replace(weight._params, scale=scale))
        return (weight, *rest)

    comfy.ops.cast_bias_weight = broken


def lora_factor_on_the_cpu(model) -> None:
    management.load_models_gpu([model])
    for module in model.model.modules():
        if getattr(module, "adapters", None) is not None and module.adapters.paths:
            paths = tuple(path._replace(adapter=path.adapter._replace(one=tuple(
                factor.to("cpu") for factor in path.adapter.one))) for path in module.adapters.paths)
            module.adapters = module.adapters._replace(paths=paths)


def no_uncast(_model) -> None:
    comfy.ops.uncast_bias_weight = lambda *_: None


def no_wait_for_the_copy(_model) -> None:
    management.sync_stream = lambda *_: None


def evicted_taken_for_resident(_model) -> None:
    comfy_aimdo.model_vbar.vbar_signature_compare = lambda now, then: now is not None and then is not None


def item_in_the_forward(_model) -> None:
    pretended_gpu.before_operator.append(lambda x, *_: x.sum().item())


def upload_in_the_forward(_model) -> None:
    pretended_gpu.before_operator.append(lambda x, *_: torch.ones(4).to(x.device, non_blocking=True))


#: Name -> (what to plant, where it must show).
FAULTS = {
    "a scale left on the CPU": (scale_on_the_cpu, "error"),
    "a LoRA factor left on the CPU": (lora_factor_on_the_cpu, "pageable"),
    "a missing uncast": (no_uncast, "pinned"),
    "a missing wait for a stream": (no_wait_for_the_copy, "races"),
    "an evicted page taken for a resident one": (evicted_taken_for_resident, "different"),
    "an item() in the forward": (item_in_the_forward, "waits"),
    "an upload in the forward": (upload_in_the_forward, "pageable"),
}
