"""GGUF files of stable-diffusion.cpp: blocks of an FP16 scale ``d`` and codes, LSB first: the canonical bytes.

======  =============  =================================  ========================================
type    weights/block  weight                             known to
======  =============  =================================  ========================================
Q1_0    128            ``d`` where the bit is set, -d     ggml, since the spring of 2026
Q2_0    64             ``d * (code - 1)``                 ggml, since the summer of 2026
PQ2_0   128            ``d * (code - 1)``                 PrismML's fork of llama.cpp
PTQ1_0  128            ``d * (code - 1)``                 PrismML's fork of llama.cpp
======  =============  =================================  ========================================

Q1_0, PQ2_0 and PTQ1_0 hold Bonsai's groups of 128 as they are. Q2_0 holds every scale twice; where the two are equal in
the whole file, they become one again. TQ1_0 and TQ2_0 share one scale among 256 weights, which Bonsai's weights do not;
every other quantized type rounds.

PTQ1_0 stores ternary codes in base 3, in runs of 16, 8 and 2 bytes of 5, 5 and 4 codes, and ``d`` after them. In a run
of W bytes code ``n * W + m`` is digit n of byte m, the first digit the most significant of five; a byte is the five
digits' number, times 256 / 243, rounded up, so that ``(byte * 3**n % 256) * 3 // 256`` is digit n.

Names are ComfyUI's, with norms called ``.scale``; files of the community have no metadata. Dense tensors are BF16,
FP16, FP32, or Q8_0: 32 int8 to an FP16 scale.

Source: ``ggml-quants.c`` of ggml, and of PrismML's fork for PQ2_0 and PTQ1_0; ``name_conversion.cpp`` of
stable-diffusion.cpp.
"""

import functools
import logging
import re
from pathlib import Path

import torch

from ...ops.packed import Packed, is_packed, pack_codes, packed_weight, unpack_codes, unwrap
from .. import gguf, klein, names
from ..errors import ModelFileError
from ..files import TensorFile
from ..klein import KleinConfig
from .interface import About, Format, Tensors, Writer

_SUFFIX = ".gguf"
#: The runs of a block of PTQ1_0: bytes, and codes in each.
_RUNS = ((16, 5), (8, 5), (2, 4))
#: Rows converted at a time to and from PTQ1_0, so that the intermediate form, larger than the codes, stays in cache.
_BLOCK_ROWS = 64


def matches(file: TensorFile) -> bool:
    # Without blocks it is an unpacked file like any other.
    return file.path.suffix.lower() == _SUFFIX and any(
        tensor.dtype == torch.uint8 for tensor in file.tensors.values())


def decode(file: TensorFile) -> Tensors:
    entries = gguf.read_header(file.path).entries
    types = names.normalise(file.path, {name: entries[file.prefix + name].type for name in file.tensors})
    stored = names.normalise(file.path, file.tensors)
    packed = {name: _unpack(stored.pop(name), types[name])
              for name in file.each(name for name, kind in types.items() if kind.bits)}
    twice = {name: packed[name] for name in packed if types[name] is gguf.Q2_0}
    if all(not scale.shape[1] % 2 and torch.equal(scale[:, ::2], scale[:, 1::2]) for _, scale in twice.values()):
        packed |= {name: (codes, scale[:, ::2].contiguous()) for name, (codes, scale) in twice.items()}
    rounded = [name for name in stored if types[name] is gguf.Q8_0]
    for name in rounded:
        if klein.is_packable(name):
            raise ModelFileError(file.path, f"{name} in one of Bonsai's types", "Q8_0, which rounds", gguf.INSTEAD)
        stored[name] = _dequantize_q8_0(stored[name])
    if rounded:
        logging.warning("%s holds %d dense tensors in Q8_0, rounded to 8 bits: they are not the published BF16 ones.",
                        file.path, len(rounded))
    # One dtype for the whole file, because ComfyUI's names join weights.
    exact = all(torch.equal(scale.bfloat16().half(), scale) for _, scale in packed.values())
    dtype = torch.bfloat16 if exact else torch.float16
    return {name: packed_weight(codes, scale.to(dtype), types[name].bits, dtype=dtype)
            for name, (codes, scale) in packed.items()} | stored


def _unpack(rows: torch.Tensor, kind: gguf.Type) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical codes and FP16 scales."""
    if rows.ndim != 2:
        raise ValueError(f"a tensor of {rows.ndim} dimensions in {kind.name}")
    blocks = rows.view(rows.shape[0], -1, kind.size)
    if kind is gguf.PTQ1_0:
        codes = torch.cat([_from_base3(each) for each in blocks[..., :-2].split(_BLOCK_ROWS)])
        return codes, blocks[..., -2:].contiguous().view(torch.float16).squeeze(-1)
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return blocks[..., 2:].reshape(rows.shape[0], -1), scale


def _from_base3(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of PTQ1_0 without their scales, ``(N, K / 128, 26)`` -> canonical codes."""
    digits = torch.arange(256)[:, None] * torch.tensor([1, 3, 9, 27, 81]) % 256 * 3 // 256
    runs = zip(blocks.split([width for width, _ in _RUNS], dim=-1), _RUNS, strict=True)
    codes = [digits.byte()[run.int()][..., :count].transpose(-1, -2).flatten(-2) for run, (_, count) in runs]
    return pack_codes(torch.cat(codes, dim=-1).flatten(1), 2)


def _to_base3(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_from_base3`. Raises ValueError on a code 3."""
    digits = unpack_codes(codes, 2).view(len(codes), -1, 128)
    if int(digits.max()) > 2:
        raise ValueError("code 3 is not ternary")
    places = torch.tensor([81, 27, 9, 3, 1])
    numbers = [(run.unflatten(-1, (count, width)) * places[:count, None]).sum(-2) for run, (width, count) in zip(
        digits.split([width * count for width, count in _RUNS], dim=-1), _RUNS, strict=True)]
    return ((torch.cat(numbers, dim=-1) * 256 + 242) // 243).byte()


def _dequantize_q8_0(rows: torch.Tensor) -> torch.Tensor:
    """FP32, which holds the product of an FP16 scale and an int8 exactly."""
    blocks = rows.view(*rows.shape[:-1], -1, gguf.Q8_0.size)
    return (blocks[..., :2].contiguous().view(torch.float16).float() * blocks[..., 2:].view(torch.int8)).flatten(-2)


def write(path: Path, tensors: Tensors, config: KleinConfig, about: About, ternary: gguf.Type) -> None:
    """A file for stable-diffusion.cpp, with ternary weights in the type ``ternary``."""
    tensors, (size, terms) = names.to_comfyui(tensors), config.published
    entries = gguf.layout({re.sub(r"_norm\.weight$", "_norm.scale", name): (_type(name, tensor, ternary), tensor.shape)
                           for name, tensor in tensors.items()})
    data = (_pack(unwrap(tensor), entry.type) if entry.type.bits else tensor
            for tensor, entry in zip(tensors.values(), entries.values(), strict=True))
    gguf.write(path, entries, data, {
        # What ComfyUI-GGUF calls it; stable-diffusion.cpp tells FLUX.2 Klein by its tensors.
        "general.architecture": "flux",
        "general.name": f"Bonsai Image {size} {about.variant}",
        "general.license": terms,
        "general.quantization_version": 2,
        "bonsai.source": about.source,
    })


def _type(name: str, tensor: torch.Tensor, ternary: gguf.Type) -> gguf.Type:
    """The type that holds ``tensor`` exactly. Raises ValueError if none does."""
    if not is_packed(tensor):
        return next(kind for kind in (gguf.BF16, gguf.F16, gguf.F32) if kind.dtype == tensor.dtype)
    packed = unwrap(tensor)
    kind = {1: gguf.Q1_0, 2: ternary}.get(packed.bits)
    if kind is None or packed.form != "symmetric" or packed.group % kind.weights:
        raise ValueError(f"{name}: GGUF has no {packed.bits}-bit {packed.form} weights in groups of {packed.group}")
    if not torch.equal(packed.scale.half().to(packed.scale.dtype), packed.scale):
        raise ValueError(f"{name}: a scale that is no FP16 number")
    return kind


def _pack(packed: Packed, kind: gguf.Type) -> torch.Tensor:
    scale = packed.scale.half().repeat_interleave(packed.group // kind.weights, dim=1)
    if kind is gguf.PTQ1_0:
        codes = torch.cat([_to_base3(rows) for rows in packed.codes.split(_BLOCK_ROWS)])
        return torch.cat((codes, scale[..., None].view(torch.uint8)), dim=-1)
    codes = packed.codes.reshape(*scale.shape, -1)
    return torch.cat((scale[..., None].view(torch.uint8), codes), dim=-1)


FORMAT = Format("gguf", matches, decode, {
    "gguf": Writer(functools.partial(write, ternary=gguf.Q2_0), (_SUFFIX,)),
    "gguf-pq2_0": Writer(functools.partial(write, ternary=gguf.PQ2_0), (_SUFFIX,)),
    "gguf-ptq1_0": Writer(functools.partial(write, ternary=gguf.PTQ1_0), (_SUFFIX,)),
}, readers={_SUFFIX: gguf.read})
