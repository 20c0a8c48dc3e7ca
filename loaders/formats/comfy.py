"""Our own format: one safetensors file with ComfyUI's names.

Per packed layer: ``weight`` uint8, the canonical codes (see ``ops/packed.py``); ``weight_scale`` in its own dtype;
``weight_shift`` where the form is not symmetric; ``comfy_quant``, uint8 JSON ``{"format": "bonsai_packed", "bits",
"group_size", "form"}``. With ``"storage": "base3"`` the tag says that ``weight`` is uint8 ``(N, ceil(K / 5))``:
five ternary codes 0, 1, 2 of a row in one byte, ``sum(code[i] * 3**i)``; a row whose K is no multiple of 5 ends in zero
digits. 1.6 bits a weight, 14 % less in all; expanded to 2 bits on loading.

Metadata: ``modelspec.*`` and ``bonsai.source`` (the repository or path the weights came from).
"""

import functools
import json
import reprlib
from pathlib import Path
from typing import cast, get_args

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open
from safetensors.torch import save_file

from ...ops.packed import FORMAT_NAME, Form, pack_codes, packed_weight, tag, unpack_codes, unwrap
from .. import names
from ..errors import ModelFileError
from ..files import SAFETENSORS_SUFFIXES, TensorFile
from ..klein import KleinConfig
from .interface import About, Format, Tensors, Writer, decode_layers, encode_layers, host_loader

_TAG = ".comfy_quant"
_BASE3_DIGITS = 5

#: Rows converted at a time to and from base 3, so that the intermediate form, larger than the codes, stays in cache.
_BLOCK_ROWS = 512


def matches(file: TensorFile) -> bool:
    """The host's tags of quantized layers."""
    return any(name.endswith(_TAG) for name in file.tensors)


def decode(file: TensorFile) -> Tensors:
    """The canonical tensors, as their tags describe them."""
    stored = names.normalise(file.path, file.tensors)
    tags = [name for name in stored if name.endswith(_TAG)]
    confs = {tag.removesuffix(_TAG): _conf(file, tag, stored.pop(tag)) for tag in tags}
    return decode_layers(file, stored, confs, ("weight", "weight_scale"), lambda layer, codes, scale: _weight(
        file, layer, confs[layer], codes, scale, stored.pop(f"{layer}.weight_shift", None)))


def _conf(file: TensorFile, tag: str, stored: torch.Tensor) -> dict:
    # Checked first: bytes() takes a lone number for a length, and would allocate it.
    text = bytes(stored.tolist()) if stored.dtype == torch.uint8 and stored.ndim == 1 else b""
    try:
        conf = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(file.path, f"JSON in {tag}", "something else") from error
    if not isinstance(conf, dict) or conf.get("format") != FORMAT_NAME:
        raise ModelFileError(file.path, f"{tag.removesuffix(_TAG)} in the format {FORMAT_NAME}",
                             text.decode(errors="replace"), host_loader(file))
    return conf


def _weight(file: TensorFile, layer: str, conf: dict, codes, scale, shift) -> QuantizedTensor:
    bits, group, form, storage = (conf.get(key) for key in ("bits", "group_size", "form", "storage"))
    if type(bits) is not int or type(group) is not int:
        raise ValueError(f"bits {reprlib.repr(bits)} and group size {reprlib.repr(group)}")
    if form not in get_args(Form) or storage not in (None, "base3"):
        raise ValueError(f"form {reprlib.repr(form)} and storage {reprlib.repr(storage)}")
    if codes.dtype != torch.uint8 or codes.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"weight {codes.dtype} {tuple(codes.shape)}, weight_scale {tuple(scale.shape)}")
    if storage == "base3":
        if bits != 2 or form != "symmetric" or file.path.suffix.lower() not in SAFETENSORS_SUFFIXES:
            raise ValueError(f"base 3 for {bits}-bit {form} weights, or outside a single safetensors file")
        codes = from_base3(_read_once(file, layer, codes), scale.shape[1] * group)
    weight = packed_weight(codes, scale, bits, cast(Form, form), shift, dtype=scale.dtype)
    if unwrap(weight).group != group:
        raise ValueError(f"groups of {unwrap(weight).group}")
    return weight


def _read_once(file: TensorFile, layer: str, codes: torch.Tensor) -> torch.Tensor:
    """The stored codes of one layer, needed once: from a handle of its own, the pages they fill are given back."""
    if not file.mapped:
        return codes
    with safe_open(file.path, "pt") as own:
        return own.get_tensor(f"{file.prefix}{layer}.weight")


def encode(tensors: Tensors, base3: bool = False) -> Tensors:
    """ComfyUI-named canonical tensors -> those of our file. Raises ValueError where base 3 does not apply."""
    def one(weight: QuantizedTensor) -> Tensors:
        packed = unwrap(weight).contiguous()
        if base3 and (packed.bits, packed.form) != (2, "symmetric"):
            raise ValueError(f"base 3 stores ternary weights, not {packed.bits}-bit {packed.form} ones")
        result = {"weight": to_base3(packed.codes) if base3 else packed.codes, "weight_scale": packed.scale,
                  "comfy_quant": tag(weight, **({"storage": "base3"} if base3 else {}))}
        return result if packed.shift is None else result | {"weight_shift": packed.shift}

    return encode_layers(tensors, one)


def to_base3(codes: torch.Tensor) -> torch.Tensor:
    """Canonical 2-bit codes ``(N, K / 4)`` of a ternary weight -> base-3 bytes. Raises ValueError on a code 3."""
    rows = []
    for block in codes.split(_BLOCK_ROWS):
        digits = unpack_codes(block, 2)
        if digits.numel() and int(digits.max()) > 2:
            raise ValueError("code 3 is not ternary")
        digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % _BASE3_DIGITS))
        rows.append(torch.stack([3**i * digits[:, i::_BASE3_DIGITS] for i in range(_BASE3_DIGITS)]).sum(0).byte())
    return torch.cat(rows)


def from_base3(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Base-3 bytes ``(N, ceil(k / 5))`` -> canonical 2-bit codes ``(N, k / 4)``.

    Raises ValueError on a byte above 242, on padding digits that are not zero, and on a wrong width.
    """
    width = packed.shape[1]
    if width != -(-k // _BASE3_DIGITS) or k % 4:
        raise ValueError(f"{width} base-3 bytes a row do not hold {k} codes")
    if packed.numel() and int(packed.max()) >= 3**_BASE3_DIGITS:
        raise ValueError(f"byte {int(packed.max())} is not base 3 (0 to {3**_BASE3_DIGITS - 1})")
    used = k - (width - 1) * _BASE3_DIGITS
    if packed.numel() and int(packed[:, -1].max()) >= 3**used:
        raise ValueError("padding digits are not zero")
    table = (torch.arange(3**_BASE3_DIGITS)[:, None] // 3 ** torch.arange(_BASE3_DIGITS) % 3).byte().to(packed.device)
    # A lookup as an embedding: measured twice as fast as indexing.
    return torch.cat([pack_codes(torch.nn.functional.embedding(rows.int(), table).flatten(1)[:, :k], 2)
                      for rows in packed.split(_BLOCK_ROWS)])


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About, base3: bool = False) -> None:
    """One safetensors file, with the codes as they are in memory or, in base 3, five ternary ones a byte."""
    save_file(encode(names.to_comfyui(tensors), base3), path, metadata(about, config))


def metadata(about: About, config: KleinConfig) -> dict[str, str]:
    """What a file says of itself."""
    size, terms = config.published
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-2-klein-{size.lower()}",
        "modelspec.title": f"Bonsai Image {size} {about.variant}",
        "modelspec.license": terms,
        "bonsai.source": about.source,
    }


FORMAT = Format("comfy", matches, decode, {
    "comfy": Writer(write, SAFETENSORS_SUFFIXES),
    "comfy-base3": Writer(functools.partial(write, base3=True), SAFETENSORS_SUFFIXES),
})
