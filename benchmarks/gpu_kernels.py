"""Every way to multiply a packed weight on this GPU: right results and time.

    python benchmarks/gpu_kernels.py                 # needs a GPU
    python benchmarks/gpu_kernels.py --tiny          # the same code on a CPU; the figures mean nothing

``benchmarks/gpu.py`` runs it in a process of its own with its case as JSON and reads the line of JSON it prints last.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import roofline
import torch

from bonsai_image.ops.backends import gemlite_backend, selfcheck, torch_backend
from bonsai_image.ops.backends.interface import Choice, Digits, int8_product
from bonsai_image.ops.backends.triton import backend as triton_backend
from bonsai_image.ops.devices import default_dtype
from bonsai_image.ops.packed import Packed, dequantize

ROOT, CUDA = Path(__file__).resolve().parent.parent, torch.device("cuda")

#: The digits of our own kernels -> the name of the way.
WAYS: dict[Digits, str] = {0: "expanded", 1: "one digit", 2: "two digits", "adaptive": "adaptive"}

#: (N, K) of the packed layers of FLUX.2 Klein 4B, and the MLP of the text encoder (4 bits).
LAYERS = (*roofline.DOUBLE, *roofline.SINGLE)
TEXT_LAYERS = ((9728, 2560), (2560, 9728))
ROWS = (1, 16, 64, 128, 256, 512, 1024, 1536, 4096, 4608)
#: Rows of image and text in a double block, and of both in a single block, at 512 x 512 and 1024 x 1024.
STEPS = ((1024, 512, 1536), (4096, 512, 4608))


def milliseconds(function, device: torch.device, flush: torch.Tensor) -> float:
    """Median time of a call with a cold second-level cache, as between the layers of a model."""
    times = []
    for _ in range(3 + 10 if device.type == "cuda" else 2):
        flush.zero_()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[len(times) // 4:])


def ways(packed, rows: int, passes: Callable[[object, Digits], bool]) -> dict[str, tuple[Callable, Digits]]:
    """Name -> ``multiply`` and its digits for every way on this layer but the library's dense product."""
    found = {backend.NAME: (backend, 0) for backend in (torch_backend, gemlite_backend) if passes(backend, 0)}
    digits = (0, 1, 2, "adaptive") if triton_backend.serves(CUDA, rows, packed, torch.bfloat16, 1, False) else (0,)
    found |= {WAYS[number]: (triton_backend, number) for number in digits if passes(triton_backend, number)}
    return {name: (functools.partial(backend.multiply, digits=number), number)
            for name, (backend, number) in found.items()}


@torch.inference_mode()
def kernels(device: torch.device, tiny: bool) -> dict:
    """Every candidate on every layer and number of rows: milliseconds, and the relative error against FP32."""
    layers, text_layers, all_rows = LAYERS, TEXT_LAYERS, ROWS
    if tiny:
        sys.path.insert(0, str(ROOT / "tests" / "lab"))
        import interpreter  # noqa: F401 (our Triton kernels on the CPU)

        layers, text_layers, all_rows = ((256, 256), (384, 512)), ((192, 256),), (1, 70)
    dtype, flush = default_dtype(device), torch.empty(1 if tiny else 256_000_000, dtype=torch.uint8, device=device)
    table = []
    kinds = [(bits, "symmetric", 128, shape) for bits in (2, 1) for shape in layers]
    kinds += [(4, "affine", 64, shape) for shape in text_layers]
    for bits, form, group, (n, k) in kinds:
        codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
        scale = torch.rand(n, k // group, device=device).add(0.5).mul(k**-0.5).bfloat16()
        packed = Packed(codes, scale, None if form == "symmetric" else -7.5 * scale, bits, form)
        weight, kind = dequantize(packed, dtype), selfcheck.Kind(bits, form, group, dtype, scale.dtype)

        def passes(backend, digits, kind=kind):
            if tiny:
                return backend is not gemlite_backend
            return not (backend.problem(device, digits) or selfcheck.problem(Choice(backend, digits), device, kind))

        for m in all_rows:
            x = torch.randn(m, k, device=device).to(dtype)
            expected = x.float() @ weight.float().t()
            calls = {"dense": (lambda x, packed, weight=weight: torch.nn.functional.linear(x, weight), 0),
                     **ways(packed, m, passes)}
            for way, (call, digits) in calls.items():
                target = int8_product(x, packed, digits) if digits else expected
                error = (call(x, packed).float() - target).norm() / target.norm()
                table.append({"bits": bits, "n": n, "k": k, "rows": m, "way": way, "error": float(error),
                              "tolerance": max(torch.finfo(dtype).eps, 2**-9),
                              "ms": milliseconds(functools.partial(call, x, packed), device, flush)})
    return {"rows": table, "steps": None if tiny else step_times(table)}


def step_times(table: list[dict]) -> dict[str, float]:
    """Way -> milliseconds of the ternary products of a step at 512 x 512 and one at 1024 x 1024."""
    times = {(r["n"], r["k"], r["rows"], r["way"]): r["ms"] for r in table if r["bits"] == 2}
    return {way: sum(
        roofline.DOUBLE_BLOCKS * sum(times.get((n, k, m, way), float("nan")) for m in (image, text)
                                     for n, k in roofline.DOUBLE)
        + roofline.SINGLE_BLOCKS * sum(times.get((n, k, both, way), float("nan")) for n, k in roofline.SINGLE)
        for image, text, both in STEPS) for way in dict.fromkeys(key[3] for key in times)}


def lines(result: dict) -> list[str]:
    """Milliseconds of every way beside dense, one line for each layer and number of rows."""
    names = list(dict.fromkeys(row["way"] for row in result["rows"]))
    text = [f"{'bits':>4} {'N x K':>13} {'rows':>5}" + "".join(f"{name:>14}" for name in names)]
    cells: dict[tuple, dict[str, float]] = {}
    for row in result["rows"]:
        cells.setdefault((row["bits"], row["n"], row["k"], row["rows"]), {})[row["way"]] = row["ms"]
    for (bits, n, k, rows), ms in cells.items():
        text.append(f"{bits:>4} {f'{n} x {k}':>13} {rows:>5}" + "".join(
            f"{ms[name]:>14.3f}" if name in ms else f"{'-':>14}" for name in names))
    if result["steps"]:
        text.append("ms of all products of two steps: " + ", ".join(f"{k} {v:.1f}" for k, v in result["steps"].items()))
    return text


def wrong(result: dict) -> list[str]:
    return [f"{r['way']} {r['n']} x {r['k']} rows {r['rows']}: error {r['error']:.2e}"
            for r in result["rows"] if not r["error"] <= r["tolerance"]]


def main() -> int:
    argument = sys.argv[1] if len(sys.argv) > 1 else ""
    if argument.startswith("{"):
        case = json.loads(argument)
        print(json.dumps(kernels(torch.device(case["device"]), case["tiny"])), flush=True)
        return 0
    tiny = argument == "--tiny"
    if not tiny and not torch.cuda.is_available():
        sys.exit("this PyTorch sees no GPU; --tiny runs the same code on the CPU")
    result = kernels(torch.device("cpu" if tiny else "cuda"), tiny)
    print("\n".join([*lines(result), *(["wrong:", *wrong(result)] if wrong(result) else ["all results are right"])]))
    return bool(wrong(result))


if __name__ == "__main__":
    sys.exit(main())
