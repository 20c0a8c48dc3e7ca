"""Every way to multiply a packed weight on this GPU: right results, time, and the line for ``ops/backends/tuning.py``.

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

ROOT = Path(__file__).resolve().parent.parent

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


def ways(packed, rows: int, tiny: bool, passes: Callable[[object, bool], bool]) -> dict[str, Callable]:
    """Name -> ``multiply`` for every candidate that differs on this layer: the library's dense product apart."""
    from bonsai_image.ops.backends import gemlite_backend, torch_backend, tuning
    from bonsai_image.ops.backends.triton import backend as triton_backend

    found = {"torch": torch_backend.multiply}
    if not tiny and passes(gemlite_backend, False):
        found["gemlite"] = gemlite_backend.multiply
    if passes(triton_backend, False):
        blocks = set()
        for workspace in tuning.WORKSPACES:
            count = len(triton_backend.row_blocks(packed, 2, workspace))
            if count not in blocks:  # a smaller limit that cuts nothing more is the same product
                tuned = tuning.DEFAULT._replace(workspace=workspace)
                found[f"exact {workspace // 10**6} MB"] = functools.partial(triton_backend.multiply, tuned=tuned)
                blocks.add(count)
    if packed.form == "symmetric" and rows >= triton_backend.INT8_MIN_ROWS and passes(triton_backend, True):
        for tile in tuning.TILES:
            found[f"int8 {tile.m}x{tile.n}"] = functools.partial(
                triton_backend.multiply, fast=True, tuned=tuning.DEFAULT._replace(tile=tile))
    return found


@torch.inference_mode()
def kernels(device: torch.device, tiny: bool) -> dict:
    """Every candidate on every layer and number of rows: milliseconds, and the relative error against FP32."""
    layers, text_layers, all_rows = LAYERS, TEXT_LAYERS, ROWS
    if tiny:
        sys.path.insert(0, str(ROOT / "tests" / "lab"))
        import interpreter  # noqa: F401 (our Triton kernels on the CPU)

        layers, text_layers, all_rows = ((256, 256), (384, 512)), ((192, 256),), (1, 70)
    from bonsai_image.ops.backends import selfcheck
    from bonsai_image.ops.backends.interface import int8_reference
    from bonsai_image.ops.devices import default_dtype
    from bonsai_image.ops.packed import Packed, dequantize

    dtype, flush = default_dtype(device), torch.empty(1 if tiny else 256_000_000, dtype=torch.uint8, device=device)
    table = []
    kinds = [(bits, "symmetric", 128, shape) for bits in (2, 1) for shape in layers]
    kinds += [(4, "affine", 64, shape) for shape in text_layers]
    for bits, form, group, (n, k) in kinds:
        codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
        scale = torch.rand(n, k // group, device=device).add(0.5).mul(k**-0.5).bfloat16()
        packed = Packed(codes, scale, None if form == "symmetric" else -7.5 * scale, bits, form)
        weight, kind = dequantize(packed, dtype), selfcheck.Kind(bits, form, group, dtype, scale.dtype)

        def passes(backend, fast, kind=kind):
            return tiny or selfcheck.problem(backend, device, kind, fast) is None

        for m in all_rows:
            x = torch.randn(m, k, device=device).to(dtype)
            expected = x.float() @ weight.float().t()
            calls = {"dense": functools.partial(torch.nn.functional.linear, x, weight)}
            calls |= {name: functools.partial(call, x, packed) for name, call in ways(packed, m, tiny, passes).items()}
            for way, call in calls.items():
                target = int8_reference(x, packed) if way.startswith("int8") else expected
                error = (call().float() - target).norm() / target.norm()
                table.append({"bits": bits, "n": n, "k": k, "rows": m, "way": way, "error": float(error),
                              "tolerance": max(torch.finfo(dtype).eps, 2**-9),
                              "ms": milliseconds(call, device, flush)})
    return {"rows": table, "line": line(table, "tiny" if tiny else torch.cuda.get_device_name(device)),
            "steps": None if tiny else step_times(table)}


def step_times(table: list[dict]) -> dict[str, float]:
    """Way -> milliseconds of the ternary products of a step at 512 x 512 and one at 1024 x 1024."""
    times = {(r["n"], r["k"], r["rows"], r["way"]): r["ms"] for r in table if r["bits"] == 2}
    exact = [name for name in dict.fromkeys(r["way"] for r in table) if name.startswith("exact")]
    totals = {}
    for way in dict.fromkeys(key[3] for key in times):
        # On a layer that a limit does not cut, the next larger one is the same product.
        same = [way, *reversed(exact[: exact.index(way)])] if way in exact else [way]

        def ms(n, k, rows, same=same):
            return next((times[n, k, rows, name] for name in same if (n, k, rows, name) in times), float("nan"))

        totals[way] = sum(
            roofline.DOUBLE_BLOCKS * sum(ms(n, k, m) for m in (image, text) for n, k in roofline.DOUBLE)
            + roofline.SINGLE_BLOCKS * sum(ms(n, k, both) for n, k in roofline.SINGLE) for image, text, both in STEPS)
    return totals


def line(table: list[dict], name: str) -> str:
    """What to enter in ``tuning.MEASURED`` for this GPU."""
    from bonsai_image.ops.backends import tuning

    times = {} if name == "tiny" else step_times(table)
    tile = min(tuning.TILES, key=lambda tile: times.get(f"int8 {tile.m}x{tile.n}", 0))
    workspace = min(tuning.WORKSPACES, key=lambda size: times.get(f"exact {size // 10**6} MB", float("inf")))
    return f'    "{name}": Tuning({tile}, {workspace}, {_gemlite_rows(table)}),'


def _gemlite_rows(table: list[dict]) -> int:
    """Rows up to which GemLite won on every layer of the model."""
    best: dict[tuple, dict[str, float]] = {}
    for row in table:
        if row["bits"] <= 2:
            way = row["way"].split()[0]
            cell = best.setdefault((row["bits"], row["n"], row["k"], row["rows"]), {})
            cell[way] = min(row["ms"], cell.get(way, float("inf")))
    lost = min((key[3] for key, ms in best.items() if ms.get("gemlite", 1e9) > ms.get("exact", 1e9)), default=1 << 30)
    return max((key[3] for key in best if key[3] < lost and "gemlite" in best[key]), default=0)


def lines(result: dict) -> list[str]:
    """Milliseconds of every way beside dense, one line for each layer and number of rows; then the line to paste."""
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
    return [*text, "for MEASURED in ops/backends/tuning.py:", result["line"]]


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
