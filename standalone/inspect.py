"""What a path holds: format, variant, counts, sizes, problems."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..loaders import find_repository, is_repository, load_text_encoder, load_transformer, load_vae
from ..loaders.errors import DOWNLOAD_AGAIN
from ..loaders.opening import open_tensors, tensor_files
from ..loaders.qwen3 import is_qwen3
from ..loaders.vae import is_vae
from ..ops.packed import is_packed, packed_nbytes


def _describe(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    packed = {name: tensor for name, tensor in tensors.items() if is_packed(tensor)}
    dense = {name: tensor for name, tensor in tensors.items() if not is_packed(tensor)}
    kinds = Counter((t._params.bits, t._params.group, t._params.form, str(t._params.scale.dtype).removeprefix("torch."))
                    for t in packed.values())
    problems = []
    invalid = [name for name, tensor in packed.items() if tensor._params.form == "symmetric"
               and tensor._params.bits == 2 and bool((tensor._qdata & (tensor._qdata >> 1) & 0x55).any())]
    if invalid:
        problems.append(f"{len(invalid)} layers hold the code 3, which is not ternary (first: {invalid[0]}); "
                        f"{DOWNLOAD_AGAIN}")
    return {
        "packed_layers": len(packed),
        "packed_weights": sum(tensor.numel() for tensor in packed.values()),
        "packed_bytes": sum(packed_nbytes(tensor) for tensor in packed.values()),
        "dense_tensors": len(dense),
        "dense_bytes": sum(tensor.nbytes for tensor in dense.values()),
        "dense_dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in dense.values()}),
        "packing": [{"bits": bits, "group_size": group, "form": form, "scale_dtype": dtype, "layers": count}
                    for (bits, group, form, dtype), count in sorted(kinds.items())],
        "file_bytes": sum(file.stat().st_size for file in tensor_files(path)),
        "problems": problems,
    }


def inspect_part(path: Path) -> dict[str, Any]:
    """Describe one model, a file or folder. Raises ModelFileError."""
    names = open_tensors(path).tensors
    if is_qwen3(names):
        encoder = load_text_encoder(path)
        return {"kind": "text encoder", "path": str(path), "format": encoder.format, "config": asdict(encoder.config),
                **_describe(path, encoder.tensors)}
    if is_vae(names):
        tensors = load_vae(path).tensors
        return {"kind": "VAE", "path": str(path), "format": "diffusers", **_describe(path, tensors)}
    model = load_transformer(path)
    return {"kind": "diffusion model", "path": str(path), "format": model.format, "variant": model.variant,
            "source": model.source, "config": asdict(model.config), **_describe(path, model.tensors)}


def inspect(path: Path) -> list[dict[str, Any]]:
    """Describe every part of a repository folder, or the one model that ``path`` is. Raises ModelFileError."""
    if not is_repository(path):
        return [inspect_part(path)]
    repository = find_repository(path)
    parts = (repository.transformer, repository.text_encoder, repository.vae)
    return [inspect_part(part) for part in parts if part is not None]


def report(part: dict[str, Any]) -> str:
    """The description of one part as lines of text."""
    lines = [f"{part['path']}", f"  {part['kind']}, {part['format']} format" + (
        f", {part['variant']}" if "variant" in part else "")]
    for packing in part["packing"]:
        lines.append("  {layers} layers of {bits} bits in groups of {group_size}, {form}, {scale_dtype} scales"
                     .format(**packing))
    lines.append(f"  {part['packed_weights']:,} packed weights in {part['packed_bytes']:,} bytes; "
                 f"{part['dense_tensors']} dense tensors in {part['dense_bytes']:,} bytes "
                 f"({', '.join(part['dense_dtypes'])})")
    lines.append(f"  {part['file_bytes']:,} bytes on disk")
    lines.extend(f"  problem: {problem}" for problem in part["problems"] or ["none"])
    return "\n".join(lines)
