"""What a bug report needs, and what will be slow: versions, devices, backends and why, memory, models found."""

import functools
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import __version__
from ..loaders import ModelFileError, find_repository
from ..loaders.description import publication
from ..loaders.opening import files_in, folders_in, tensor_files
from ..loaders.repository import repositories_in
from ..ops import backends
from ..ops.backends import Setting, libraries, selfcheck
from ..ops.devices import cpu_has_fast_bfloat16, default_dtype, device_name
from ..ops.packed import Form, Packed, dequantize
from . import comfyui

#: What the nodes need, then what makes them faster or adds a command.
_LIBRARIES = ("comfy-kitchen", "safetensors", "triton", "triton-windows", "gemlite", "llvmlite", "mlx", "gguf",
              "diffusers", "transformers", "ray")
#: ComfyUI's model folders of single files, with their older names.
_SINGLE_FILES = ("diffusion_models", "unet", "text_encoders", "clip")


def _meta(bits: int, group: int, form: Form) -> Packed:
    """A weight without values, whose scales are BF16."""
    scale = torch.empty(3072, 3072 // group, dtype=torch.bfloat16, device="meta")
    codes = torch.empty(3072, 3072 * bits // 8, dtype=torch.uint8, device="meta")
    return Packed(codes, scale, None if form == "symmetric" else scale, bits, form)


#: One layer of each kind of Bonsai Image.
_KINDS = {"ternary": _meta(2, 128, "symmetric"), "binary": _meta(1, 128, "symmetric"),
          "text encoder": _meta(4, 64, "affine")}
#: (N, K, occurrences) of the packed layers in a step of FLUX.2 Klein 4B at 512 x 512, and their rows: those of image
#: and text together, which a double block multiplies one after the other.
_SHAPES = ((9216, 3072, 5), (3072, 3072, 5), (18432, 3072, 5), (3072, 9216, 5), (27648, 3072, 20), (3072, 12288, 20))
_ROWS = 1536


def diagnose(program: Path, measure: bool = False) -> dict[str, Any]:
    """Everything about this machine and the installation in the folder ``program``. Runs the self-checks, and times the
    products of a step if ``measure``."""
    base = comfyui.find(program)
    devices = [_device(device) | ({"times": _times(device)} if measure else {}) for device in _devices()]
    return {
        "versions": {"bonsai-image": __version__, "python": platform.python_version(),
                     "system": f"{platform.system()} {platform.release()} {platform.machine()}",
                     # The metadata of torch on PyPI does not say which GPUs it was built for.
                     "ComfyUI": comfyui.version(base) if base else None, "torch": str(torch.__version__),
                     **{name: libraries.version(name) for name in _LIBRARIES}},
        "devices": devices,
        "memory": {"total": psutil.virtual_memory().total, "free": psutil.virtual_memory().available},
        "ComfyUI": str(base) if base else None,
        "models": list(_models(base)) if base else [],
        "advice": list(dict.fromkeys(text for device in devices for text in _advice(device))),
    }


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        yield from (torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count()))


def _device(device: torch.device) -> dict[str, Any]:
    dtype = default_dtype(device)
    found: dict[str, Any] = {"device": str(device), "name": device_name(device)
                             + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
                             "dtype": str(dtype).removeprefix("torch.")}
    if device.type in ("cuda", "xpu"):
        found["free"], found["total"] = torch.get_device_module(device).mem_get_info(device)
    choose = functools.partial(backends.choose, device=device, rows=backends.IMAGE_ROWS, dtype=dtype)
    found["backends"] = {precision: {name: str(choose(Setting("auto", precision), packed=packed))
                                     for name, packed in _KINDS.items()} for precision in backends.PRECISIONS}
    found["not used"] = {
        backend.NAME: choice.reason for backend in backends.BACKENDS
        if not backend.DEVICES or device.type in backend.DEVICES
        if (choice := choose(Setting(backend.NAME), packed=_KINDS["ternary"])).backend is not backend}
    return found


def _times(device: torch.device) -> dict[str, dict[str, float]]:
    """Shape -> way -> milliseconds of a product, and of the packed products of a step at 512 x 512."""
    dtype, packed = default_dtype(device), _KINDS["ternary"]
    able, _ = backends.ways((0, 2, 1, "adaptive"), "auto", device, _ROWS, packed, dtype)
    ways = tuple(reversed({way.digits: way for way in reversed(able)}.values()))
    found, step = dict[str, dict[str, float]](), Counter[str]()
    for n, k, count in _SHAPES:
        x, weight = selfcheck.example(selfcheck.kind(packed, dtype), _ROWS, n, k, device)
        calls = {"dense": functools.partial(torch.nn.functional.linear, x, dequantize(weight, dtype))}
        calls |= {str(way): functools.partial(way.backend.multiply, x, weight, way.digits) for way in ways}
        found[f"{n} x {k}"] = times = selfcheck.milliseconds(calls, device)
        step.update({way: count * each for way, each in times.items()})
    return found | {"step": dict(step)}


def _time_lines(times: dict[str, dict[str, float]]) -> Iterator[str]:
    """A table in Markdown: dense in milliseconds, the others as multiples of it."""
    names = list(times["step"])
    yield f"| N x K, {_ROWS} rows | " + " | ".join(names) + " |"
    yield "|---" * (1 + len(names)) + "|"
    for shape, each in times.items():
        ratios = (f"{each[name] / each['dense']:.2f}" for name in names[1:])
        yield f"| {shape} | {each['dense']:.1f} ms | " + " | ".join(ratios) + " |"


def _models(base: Path) -> Iterator[dict[str, Any]]:
    """The repositories and single files in the model folders of the ComfyUI whose data is in ``base``."""
    folders = [(kind, base / "models" / kind) for kind in ("diffusers", *_SINGLE_FILES)]
    try:
        folders += comfyui.listed(base)
    except ModelFileError as error:
        yield {"path": str(error.path), "problem": str(error)}
    roots = dict.fromkeys(folder for kind, folder in folders if kind == "diffusers")
    for folder in (found for root in roots for found in repositories_in(root)):
        try:
            repository = find_repository(folder)
        except ModelFileError as error:
            yield {"path": str(folder), "problem": str(error)}
            continue
        parts = filter(None, (repository.transformer, repository.text_encoder, repository.vae))
        yield from (_file(file) for part in parts for file in tensor_files(part))
    for root in dict.fromkeys(folder for kind, folder in folders if kind in _SINGLE_FILES and folder.is_dir()):
        for folder in (root, *folders_in(root)):
            yield from (_file(file) for file in files_in(folder) if "bonsai" in str(file.relative_to(root)).lower())


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "published": publication(path)}


def _advice(device: dict[str, Any]) -> Iterator[str]:
    """What makes ``device`` slower than it has to be."""
    if device["device"] == "cpu":
        if not cpu_has_fast_bfloat16():
            yield "this CPU has no BF16 instructions, so activations are FP32 and about four times slower"
        if "cpu" in device["not used"]:
            yield f"CPU: {device['not used']['cpu']}"
    elif "triton" in device["not used"]:
        yield f"{device['name']}: {device['not used']['triton']}"
    if device.get("total", 1 << 40) < 3 << 30:
        yield f"{device['name']} has less than 3 GB; start ComfyUI with --novram, or draw on the CPU"


def report(found: dict[str, Any]) -> str:
    """``found`` as one page of text."""
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)]
    missing = [name for name, version in found["versions"].items() if version is None]
    lines += [f"not installed: {', '.join(missing)}",
              f"memory: {found['memory']['free'] / 1e9:.1f} of {found['memory']['total'] / 1e9:.1f} GB free"]
    for device in found["devices"]:
        free = f", {device['free'] / 1e9:.1f} of {device['total'] / 1e9:.1f} GB free" if "free" in device else ""
        lines.append(f"{device['device']}: {device['name']}, {device['dtype']}{free}")
        for precision, chosen in device["backends"].items():
            lines.append(f"  {precision}: " + ", ".join(f"{kind} by {name}" for kind, name in chosen.items()))
        lines += [f"  not {name}: {problem}" for name, problem in device["not used"].items()]
        lines += ["", *_time_lines(device["times"]), ""] if "times" in device else []
    for model in found["models"]:
        lines.append(f"{model['path']}: {model.get('problem') or model['published'] or 'not a published file'}")
    if not found["models"]:
        place = f"ComfyUI in {found['ComfyUI']}" if found["ComfyUI"] else "ComfyUI, which was not found"
        lines.append(f"no Bonsai Image model found in the model folders of {place}")
    return "\n".join([*lines, *(f"slow: {text}" for text in found["advice"])])
