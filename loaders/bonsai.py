"""Our own format: one safetensors file with ComfyUI's names.

Per packed layer: ``weight`` uint8, the canonical codes (see ``ops/packed.py``); ``weight_scale`` in its own dtype;
``weight_shift`` where the form is not symmetric; ``comfy_quant``, uint8 JSON ``{"format": "bonsai_packed", "bits",
"group_size", "form"}``. With ``"storage": "base3"`` the tag says that ``weight`` holds five ternary codes a byte
(``ops/codecs.py``): 14 % smaller, expanded to 2 bits on loading.

Metadata: ``modelspec.*`` and ``bonsai.source`` (the repository or path the weights came from).
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import get_args

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open

from ..ops import codecs
from ..ops.packed import FORMAT_NAME, Form, packed_weight, tag
from . import names
from .errors import DOWNLOAD_AGAIN, ModelFileError
from .files import SAFETENSORS_SUFFIXES, TensorFile

NAME = "comfy"
_TAG = ".comfy_quant"


def matches(file: TensorFile) -> bool:
    return any(name.endswith(_TAG) for name in file.tensors)


def decode(file: TensorFile) -> dict[str, torch.Tensor]:
    stored = names.normalise(file.path, file.tensors)
    result = {}
    for layer in file.each(name.removesuffix(_TAG) for name in stored if name.endswith(_TAG)):
        conf = _conf(file.path, layer, stored.pop(f"{layer}{_TAG}"))
        parts = [stored.pop(f"{layer}.weight{suffix}", None) for suffix in ("", "_scale", "_shift")]
        if parts[0] is None or parts[1] is None:
            raise ModelFileError(file.path, f"weight and weight_scale of {layer}", "one of them missing",
                                 DOWNLOAD_AGAIN)
        try:
            result[f"{layer}.weight"] = _weight(file, layer, conf, *parts)
        except ValueError as error:
            raise ModelFileError(file.path, f"{layer} packed as its tag says", str(error), DOWNLOAD_AGAIN) from error
    return result | stored


def _conf(path: Path, layer: str, stored: torch.Tensor) -> dict:
    # Checked first: bytes() takes a lone number for a length, and would allocate it.
    text = bytes(stored.tolist()) if stored.dtype == torch.uint8 and stored.ndim == 1 else b""
    try:
        conf = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"JSON in {layer}{_TAG}", "something else", DOWNLOAD_AGAIN) from error
    if not isinstance(conf, dict) or conf.get("format") != FORMAT_NAME:
        raise ModelFileError(path, f"{layer} in the format {FORMAT_NAME}", text.decode(errors="replace"),
                             "load it with ComfyUI's Load Diffusion Model instead")
    return conf


def _weight(file: TensorFile, layer: str, conf: dict, codes, scale, shift) -> QuantizedTensor:
    bits, group, form, storage = (conf.get(key) for key in ("bits", "group_size", "form", "storage"))
    if type(bits) is not int or bits not in (1, 2, 4) or type(group) is not int or group < 1:
        raise ValueError(f"bits {reprlib.repr(bits)} and group size {reprlib.repr(group)}")
    if form not in get_args(Form) or storage not in (None, "base3"):
        raise ValueError(f"form {reprlib.repr(form)} and storage {reprlib.repr(storage)}")
    if codes.dtype != torch.uint8 or codes.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"weight {codes.dtype} {tuple(codes.shape)}, weight_scale {tuple(scale.shape)}")
    if storage == "base3":
        if bits != 2 or form != "symmetric" or file.path.suffix.lower() not in SAFETENSORS_SUFFIXES:
            raise ValueError(f"base 3 for {bits}-bit {form} weights, or outside a single safetensors file")
        # The stored bytes are needed once: through a handle of its own the pages they fill are given back at once.
        with safe_open(file.path, "pt") as own:
            prefix = names.prefix(file.tensors)
            codes = codecs.from_base3(own.get_tensor(f"{prefix}{layer}.weight"), scale.shape[1] * group)
    weight = packed_weight(codes, scale, bits, form, shift, dtype=scale.dtype)
    if weight._params.group != group:
        raise ValueError(f"groups of {weight._params.group}")
    return weight


def encode(tensors: dict[str, torch.Tensor], base3: bool) -> dict[str, torch.Tensor]:
    """ComfyUI-named canonical tensors -> the tensors of our file. Raises ValueError where base 3 does not apply."""
    result = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            result[name] = tensor.contiguous()
            continue
        params, layer = tensor._params, name.removesuffix(".weight")
        if base3 and (params.bits != 2 or params.form != "symmetric"):
            raise ValueError(f"base 3 stores ternary weights; {name} has {params.bits}-bit {params.form} ones")
        result[name] = codecs.to_base3(tensor._qdata) if base3 else tensor._qdata.contiguous()
        result[f"{name}_scale"] = params.scale.contiguous()
        if params.shift is not None:
            result[f"{name}_shift"] = params.shift.contiguous()
        result[f"{layer}{_TAG}"] = tag(tensor, **({"storage": "base3"} if base3 else {}))
    return result


def metadata(variant: str, source: str) -> dict[str, str]:
    """What a saved file says of itself."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-2-klein-4b",
        "modelspec.title": f"Bonsai Image 4B {variant}",
        "modelspec.license": "apache-2.0",
        "bonsai.source": source,
    }
