"""Bonsai Image beside dense BF16 FLUX.2 Klein on one GPU: correctness of every way to multiply, then speed and memory.

    python benchmarks/gpu.py --out gpu.json          # needs a GPU; COMFYUI_PATH adds the rows of the real host
    python benchmarks/gpu.py --tiny                  # the same code on a CPU in minutes; the figures mean nothing

All weights are random, of full size, made on the fly (about 5 GB in a temporary folder, or kept in ``--models FOLDER``;
40 GB of memory). The dense model is the packed one expanded (in its load time), so that both compute the same and their
latents compare. Every measurement runs in a process of its own with an empty Triton cache; its row is printed, and
``--out`` written, as soon as it is done, so that what was measured before an interruption is not lost. ``--cases``
chooses some by parts of their names, such as ``comfyui-default`` or ``embedded``, with the dense one to compare with.
Exits with 1 if a result is wrong.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_kernels
import roofline
import torch

from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.loaders.qwen3 import Qwen3Config
from bonsai_image.tests.support import random_model

#: What measures a case, by its kind.
SCRIPTS = {"kernels": "gpu_kernels.py", "embedded": "gpu_case.py", "comfyui": "gpu_case.py"}
KLEIN = KleinConfig()
QWEN3 = Qwen3Config()
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 32}
#: ComfyUI knows the text encoder by its width of 2560 and brings a tokenizer of 151936.
TINY_KLEIN = KleinConfig(num_attention_heads=2, num_layers=1, num_single_layers=2)
TINY_QWEN3 = Qwen3Config(num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1, intermediate_size=128)
TINY_VAE = {**VAE, "decoder_block_out_channels": (32, 64, 128, 128)}

#: Latents of the exact ways may differ from the dense model's by the rounding of 16-bit activations over four steps.
LATENT_TOLERANCE = 0.05

_FLAGS = {"resident": ["--highvram"], "default": [], "novram": ["--novram"], "cpu": ["--cpu"]}


def write_models(folder: Path, tiny: bool) -> dict[str, Path]:
    klein, text, vae = (TINY_KLEIN, TINY_QWEN3, TINY_VAE) if tiny else (KLEIN, QWEN3, VAE)
    repositories = {name: folder / f"{name}{'-tiny' if tiny else ''}" for name in ("ternary", "binary")}
    for name, path in repositories.items():
        if not path.is_dir():
            # Whole or not at all: an interrupted run must not be found by the next.
            partial = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            random_model.write_repository(partial, {"ternary": 2, "binary": 1}[name], 0, klein, text, vae)
            partial.rename(path)
    return repositories


def chosen(cases: list[dict], parts: list[str]) -> list[dict]:
    """The cases with one of ``parts`` in the name, and the dense ones that they are compared with."""
    wanted = [case for case in cases if any(part in case["name"] for part in parts)]
    twins = {(case["kind"], case["mode"]) for case in wanted}
    return [case for case in cases
            if case in wanted or (case["variant"] == "dense" and (case["kind"], case["mode"]) in twins)]


def plan(repositories: dict[str, Path], device: str, tiny: bool, comfyui: str | None) -> list[dict]:
    """Every measurement but the kernels, the dense model before the packed ones it is compared with."""
    hosts = [("embedded", "resident")]
    if comfyui:
        # The host takes one of its memory flags, and --cpu is among them.
        hosts += [("comfyui", mode) for mode in (("cpu",) if tiny else ("resident", "default", "novram"))]
    models = [("dense", "exact"), ("ternary", "exact"), ("ternary", "fast"), ("binary", "exact"), ("binary", "fast")]
    return [{"kind": host, "mode": mode, "variant": variant, "precision": precision, "device": device,
             "name": f"{host}-{mode}-{variant}-{precision}", "comfyui": comfyui, "tiny": tiny,
             "flags": _FLAGS[mode],
             "checkpoint": str(repositories["binary" if variant == "binary" else "ternary"]),
             "sizes": (64, 96) if tiny else (512, 1024), "new_size": 80 if tiny else 768,
             "repeats": 1 if tiny else 3}
            for host, mode in hosts for variant, precision in models]


def run(case: dict, seconds: float) -> dict:
    """One case in a process of its own. What fails is reported in its row, and the others still run."""
    with tempfile.TemporaryDirectory() as cache:
        # In a folder of its own: ComfyUI writes a log where it runs.
        script = Path(__file__).with_name(SCRIPTS[case["kind"]])
        try:
            done = subprocess.run([sys.executable, str(script), json.dumps(case)], capture_output=True, text=True,
                                  cwd=cache, timeout=seconds,
                                  env={**os.environ, "TRITON_CACHE_DIR": cache,
                                       "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def difference(latents: Path, case: dict, size: int) -> float | None:
    """Relative difference of the final latent to the dense model's in the same host; only ternary has that twin, and
    not where the dense model did not fit."""
    twin = latents / f"{case['kind']}-{case['mode']}-dense-exact-{size}.pt"
    if case["variant"] != "ternary" or not twin.exists():
        return None
    a, b = (torch.load(path, weights_only=True).float() for path in (latents / f"{case['name']}-{size}.pt", twin))
    return float((a - b).norm() / b.norm())


def environment(device: str) -> dict:
    packages = {}
    for name in ("torch", "triton", "gemlite", "diffusers", "transformers", "comfy-kitchen", "comfy-aimdo"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    found = {"system": platform.platform(), "python": platform.python_version(), "packages": packages}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": list(torch.cuda.get_device_capability(0)),
                  "memory_mb": properties.total_memory / 1e6, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return found


#: The head of the table that :func:`image_lines` makes.
IMAGE_HEAD = (f"{'host':<9}{'mode':<9}{'model':<15}{'size':>5}{'step s':>9}{'ratio':>7}{'model':>7}{'image s':>9}"
              f"{'ratio':>7}{'first s':>9}{'load s':>8}{'new':>6}{'peak MB: encode':>16}{'denoise':>9}{'decode':>8}"
              f"{'latent':>8}")


def modelled(device: str, case: dict, size: str) -> str:
    """The ratio of a step that ``roofline.py`` expects on ``device``."""
    times = roofline.expected(device, int(size), 1 if case["variant"] == "binary" else 2)
    if times is None or case["variant"] == "dense":
        return f"{'-':>7}"
    exact = min(times["expanded"], times["two digits"])
    return f"{times['dense'] / (exact if case['precision'] == 'exact' else min(exact, times['one digit'])):>7.2f}"


def image_lines(case: dict, result: dict, dense: dict | None, device: str) -> list[str]:
    """One line for each size. Ratios are the time of ``dense``, the result of the dense model in the same host and
    mode, over this time: above 1 is faster."""
    head = f"{case['kind']:<9}{case['mode']:<9}{case['variant'] + ' ' + case['precision']:<15}"
    if "failed" in result:
        return [f"{head} failed: {result['failed']}"]
    lines, new = [], result["new_resolution"]
    for size, figures in result["sizes"].items():
        base, peak = (dense or {}).get("sizes", {}).get(size), figures["peak_mb"]
        ratios = [f"{base[key] / figures[key]:>7.2f}" if base else f"{'-':>7}"
                  for key in ("step_seconds", "image_seconds")]
        latent = figures["latent_difference"]
        lines.append(
            f"{head}{size:>5}{figures['step_seconds']:>9.4f}{ratios[0]}"
            f"{modelled(device, case, size)}{figures['image_seconds']:>9.3f}{ratios[1]}"
            f"{result['first_image_seconds']:>9.2f}{result['load_seconds']:>8.1f}"
            f"{new['first_seconds'] / new['warm_seconds']:>6.2f}{peak['encode']:>16.0f}{peak['denoise']:>9.0f}"
            f"{peak['decode']:>8.0f}{'-' if latent is None else f'{latent:.4f}':>8}")
    return lines


def measure_kernels(report: dict, device: str, tiny: bool, seconds: float) -> list[str]:
    """Print and note the kernels; what is wrong with them."""
    kernels = report["kernels"] = run({"kind": "kernels", "device": device, "tiny": tiny}, seconds)
    if "failed" in kernels:
        return [f"kernels: {kernels['failed']}"]
    print("\n".join(gpu_kernels.lines(kernels)), flush=True)
    return gpu_kernels.wrong(kernels)


def measure_image(case: dict, latents: Path, report: dict, dense: dict, seconds: float) -> list[str]:
    """Print and note one case; what is wrong with it. ``dense`` collects the results to compare with."""
    result, wrong = run({**case, "latents": str(latents)}, seconds), []
    for size, figures in result.get("sizes", {}).items():
        latent = figures["latent_difference"] = difference(latents, case, int(size))
        if latent is not None and case["precision"] == "exact" and not latent <= LATENT_TOLERANCE:
            wrong.append(f"{case['name']} {size}: latent differs by {latent:.3f}")
    report["images"].append({**case, **result})
    if case["variant"] == "dense":
        dense[case["kind"], case["mode"]] = result
    print("\n".join(image_lines(case, result, dense.get((case["kind"], case["mode"])),
                                report["environment"].get("device", ""))), flush=True)
    return wrong + ([f"{case['name']}: {result['failed']}"] if "failed" in result else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: shows that the script runs")
    parser.add_argument("--only", choices=("kernels", "images"), help="half of it")
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases with one of these in the name")
    parser.add_argument("--models", type=Path, help="folder to keep the random models in, or to find them in")
    parser.add_argument("--seconds", type=float, default=300, help="longest that one case may take")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    device, wrong = "cpu" if args.tiny else "cuda", []
    report: dict = {"environment": environment(device), "tiny": args.tiny, "images": []}

    def write() -> None:
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if args.only != "images":
        wrong += measure_kernels(report, device, args.tiny, args.seconds)
        write()
    if args.only != "kernels":
        with tempfile.TemporaryDirectory() as folder:
            repositories = write_models(args.models or Path(folder), args.tiny)
            cases = chosen(plan(repositories, device, args.tiny, os.environ.get("COMFYUI_PATH")), args.cases)
            wrong += [] if cases else [f"no case has one of {args.cases} in its name"]
            dense: dict[tuple, dict] = {}
            print(IMAGE_HEAD, flush=True)
            for case in cases:
                wrong += measure_image(case, Path(folder), report, dense, args.seconds)
                write()
    print("\n".join(["wrong:", *wrong] if wrong else ["all results are right"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
