"""The kernels of ``benchmarks/gpu.py``, in a process of its own: ``python gpu_kernels.py '<JSON>'``.

Prints one line of JSON last: milliseconds and error of every way to multiply, on every layer and number of rows.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

#: (N, K) of the packed layers of FLUX.2 Klein 4B as ComfyUI names them, and the MLP of the text encoder (4 bits).
LAYERS = ((3072, 3072), (9216, 3072), (18432, 3072), (3072, 9216), (27648, 3072), (3072, 12288))
TEXT_LAYERS = ((9728, 2560), (2560, 9728))
ROWS = (1, 16, 64, 128, 256, 512, 1024, 1536, 4096, 4608)


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


@torch.inference_mode()
def kernels(case: dict) -> dict:
    """Every way on every layer and number of rows: milliseconds, and the relative error against FP32."""
    device = torch.device(case["device"])
    layers, text_layers, all_rows = LAYERS, TEXT_LAYERS, ROWS
    if case["tiny"]:
        sys.path.insert(0, str(ROOT / "tests" / "lab"))
        import interpreter  # noqa: F401 (our Triton kernels on the CPU)

        layers, text_layers, all_rows = ((256, 256), (384, 512)), ((192, 256),), (1, 70)
    from bonsai_image.ops import gemlite_backend, int8_reference, selfcheck, torch_backend, triton_backend
    from bonsai_image.ops.devices import default_dtype
    from bonsai_image.ops.packed import Packed, dequantize

    dtype, flush = default_dtype(device), torch.empty(1 if case["tiny"] else 256_000_000, dtype=torch.uint8,
                                                          device=device)
    rows_of_table = []
    kinds = [(bits, "symmetric", 128, shape) for bits in (2, 1) for shape in layers]
    kinds += [(4, "affine", 64, shape) for shape in text_layers]
    for bits, form, group, (n, k) in kinds:
        codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
        scale = torch.rand(n, k // group, device=device).add(0.5).mul(k**-0.5).bfloat16()
        shift = None if form == "symmetric" else -7.5 * scale
        packed = Packed(codes, scale, shift, bits, form)
        kind, weight = selfcheck.Kind(bits, form, group, dtype, scale.dtype), dequantize(packed, dtype)
        for m in all_rows:
            x = torch.randn(m, k, device=device).to(dtype)
            expected = x.float() @ weight.float().t()
            ways = {"dense": functools.partial(torch.nn.functional.linear, x, weight)}
            for way, backend in (("torch", torch_backend), ("triton", triton_backend), ("gemlite", gemlite_backend),
                                 ("int8", triton_backend)):
                if way == "int8" and form != "symmetric":
                    continue
                usable = way == "torch" or (case["tiny"] and way != "gemlite") or (
                    not case["tiny"] and selfcheck.passes(backend, device, kind, way == "int8"))
                if usable:
                    ways[way] = functools.partial(backend.multiply, x, packed, way == "int8")
            for way, function in ways.items():
                target = int8_reference.multiply(x, packed) if way == "int8" else expected
                out = function().float()
                rows_of_table.append({
                    "bits": bits, "n": n, "k": k, "rows": m, "way": way,
                    "error": float((out - target).norm() / target.norm()),
                    "error_of_activations": float((target - expected).norm() / expected.norm()),
                    "tolerance": max(torch.finfo(dtype).eps, 2**-9),
                    "ms": milliseconds(function, device, flush)})
    return {"rows": rows_of_table, "gemlite_rows": _gemlite_rows(rows_of_table)}


def _gemlite_rows(table: list[dict]) -> int | None:
    """``gemlite_backend.SPLIT_K_ROWS`` as measured on this GPU: rows up to which GemLite won on every
    layer of the model."""
    times = {(r["bits"], r["n"], r["k"], r["rows"], r["way"]): r["ms"] for r in table if r["bits"] <= 2}
    lost = [key[3] for key, ms in times.items() if key[4] == "gemlite" and ms > times.get((*key[:4], "triton"), 0)]
    tried = sorted({key[3] for key in times if key[4] == "gemlite"})
    return None if not tried else max((rows for rows in tried if rows < min(lost, default=1 << 30)), default=0)


if __name__ == "__main__":
    print(json.dumps(kernels(json.loads(sys.argv[1]))), flush=True)
