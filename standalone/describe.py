"""The command ``inspect``: format, variant, counts and sizes of what a path holds, which published file it is, and what
is wrong with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..loaders import find_repository, is_repository, load_lora
from ..loaders.description import count, holds_code_3, publication, sha256, variant
from ..loaders.errors import DOWNLOAD_AGAIN
from ..loaders.klein import KleinConfig, comfyui_shapes
from ..loaders.lora import COMFY_LORA, RECOVERY
from ..loaders.lora_names import of_lora
from ..loaders.models import LOADERS, Transformer, Vae
from ..loaders.opening import open_tensors, tensor_files
from ..loaders.repository import WORDS, parts_of


def describe(path: Path, verify: bool = False) -> list[dict[str, Any]]:
    """Describe every part of a repository folder, or the one model or LoRA that ``path`` is. With ``verify`` every code
    is checked and every file hashed. Raises ModelFileError."""
    if not is_repository(path):
        tensors = open_tensors(path).tensors
        if any(map(of_lora, tensors)):
            return [_lora(path)]
        return [_part(path, part, verify) for part in parts_of(tensors) or LOADERS]
    repository = find_repository(path)
    parts = [_part(folder, part, verify) for part in LOADERS if (folder := getattr(repository, part))]
    return parts + [{"kind": WORDS.get(part, "other folder"), "path": str(error.path), "problems": [str(error)]}
                    for part, error in repository.problems.items()]


def _lora(path: Path) -> dict[str, Any]:
    """A LoRA, and what of it has an effect on FLUX.2 Klein 4B."""
    lora = load_lora(path)
    applied = sum(map(len, lora.fitting(comfyui_shapes(KleinConfig())).values()))
    ignored = [f"ComfyUI's loaders ignore {lora.ignored} of its layers; convert it with --to {COMFY_LORA}"]
    return {"kind": "LoRA", "path": str(path), "kinds": dict(lora.kinds()), "naming": dict(lora.naming),
            "ranks": lora.ranks(), "layers": len(lora.groups), "layers_that_fit_4B": applied,
            "made_for": lora.made_for(), "recovery": lora.said(RECOVERY), "file_bytes": lora.path.stat().st_size,
            "problems": lora.without_effect(applied) + (ignored if lora.ignored else [])}


def _part(path: Path, name: str, verify: bool) -> dict[str, Any]:
    """The part ``name`` of a file or folder."""
    model = LOADERS[name](path)
    files = tensor_files(path)
    counts = count(model.tensors)._asdict()
    counts["packing"] = [{"bits": bits, "group_size": group, "form": form, "scale_dtype": dtype, "layers": layers}
                         for (bits, group, form, dtype), layers in counts["packing"].items()]
    part = {"kind": WORDS[name], "path": str(path), "format": model.format, **counts,
            "file_bytes": sum(file.stat().st_size for file in files),
            "published": [text for file in files if (text := publication(file, _hash(file) if verify else None))],
            "warnings": model.warnings, "problems": []}
    if isinstance(model, Transformer):
        part |= {"variant": variant(model.tensors, check_codes=verify), "source": model.source}
    part["config"] = model.config if isinstance(model, Vae) else asdict(model.config)
    if verify and (invalid := [name for name, tensor in model.tensors.items() if holds_code_3(tensor)]):
        part["problems"] = [f"{len(invalid)} layers hold the code 3, which is not ternary (first: {invalid[0]}); "
                            f"{DOWNLOAD_AGAIN}"]
    return part


def _hash(file: Path) -> str:
    """The SHA-256 of ``file``, with a bar on stderr that counts its bytes."""
    with tqdm(desc=f"hashing {file.name}", total=file.stat().st_size, unit="B", unit_scale=True) as bar:
        return sha256(file, lambda done, total: bar.update(done - bar.n))


def report(part: dict[str, Any]) -> str:
    """The description of one part as lines of text."""
    names = part["kind"], f"{part['format']} format" if "format" in part else None, part.get("variant")
    lines = [part["path"], ", ".join(filter(None, names))]
    if "format" in part:
        packing = "{layers} layers of {bits} bits in groups of {group_size}, {form}, {scale_dtype} scales"
        lines += [packing.format(**each) for each in part["packing"]]
        lines += [f"{part['packed_weights']:,} packed weights in {part['packed_bytes']:,} bytes; "
                  f"{part['dense_tensors']} dense tensors in {part['dense_bytes']:,} bytes "
                  f"({', '.join(part['dense_dtypes'])})"]
    if "naming" in part:
        lines += [f"{count} layers of {what}" for kind in ("kinds", "naming") for what, count in part[kind].items()]
        lines += [f"rank {', '.join(map(str, part['ranks']))}" if part["ranks"] else "no rank",
                  f"made for {part['made_for']}; {part['layers_that_fit_4B']} of {part['layers']} layers fit FLUX.2 "
                  "Klein 4B"]
        lines += [f"recovery, {name}: {json.dumps(value)}" for name, value in part["recovery"].items()]
    if "file_bytes" in part:
        lines.append(f"{part['file_bytes']:,} bytes on disk")
    lines += [*part.get("published", ()), *(f"warning: {warning}" for warning in part.get("warnings", ()))]
    lines += [f"problem: {problem}" for problem in part["problems"] or ["none"]]
    return "\n  ".join(lines)
