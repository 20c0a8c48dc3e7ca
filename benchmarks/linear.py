"""Packed against dense linears on this machine's CPU, side by side: dense, expanded, and with int8 digits.

    python benchmarks/linear.py [--rows 64 512 1536 4608] [--threads 1 2] [--dtype bf16] [--bits 2] [--busy 2]

The shapes are the distinct block linears of FLUX.2 Klein 4B under ComfyUI's names. All columns of a line are timed in
turn, and each is its median wall time; the last lines of a table weigh a shape by how often the model has it. CPU
seconds are those of all threads, which go on spinning for a while in each wait.

``torch`` and ``expanded`` keep the activations; the others are two digits, one, and adaptive: without outlying columns,
and with four that are 30 times as large as the rest. ``--busy N`` computes beside N processes that do nothing else.

Other CPUs are measured by switching features off, for torch and for our kernels:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/linear.py --dtype fp32 --kinds avx2 vnni256
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from bonsai_image.ops.backends import torch_backend
from bonsai_image.ops.backends.cpu import backend as cpu_backend
from bonsai_image.ops.backends.interface import Digits
from bonsai_image.ops.devices import DTYPES
from bonsai_image.ops.packed import Packed, dequantize, pack_codes

#: (N, K, occurrences in one forward).
SHAPES = ((9216, 3072, 10), (3072, 3072, 10), (18432, 3072, 10), (3072, 9216, 10), (27648, 3072, 20), (3072, 12288, 20))


#: Way -> digits.
WAYS: dict[str, Digits] = {"two": 2, "one": 1, "adaptive": "adaptive", "outliers": "adaptive"}


def random_levels(n: int, k: int, bits: int) -> Packed:
    """A ternary or binary weight of random levels."""
    levels = torch.randint(0, 3 if bits == 2 else 2, (n, k), dtype=torch.uint8)
    return Packed(pack_codes(levels, bits), (torch.rand(n, k // 128) + 0.5).bfloat16(), None, bits, "symmetric")


def cpu_name() -> str:
    """The CPU's model, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    if not fields:
        return platform.processor()
    return f"{fields.get('model name')}, family {fields.get('cpu family')} model {fields.get('model')}"


def time_in_turn(functions: dict[str, Callable], repeats: int) -> dict[str, tuple[float, float]]:
    """For each function the median wall and CPU seconds of ``repeats``, after a run to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(1 + repeats):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (statistics.median(wall for wall, _ in runs[1:]), statistics.median(cpu for _, cpu in runs[1:]))
            for name, runs in seconds.items()}


def table(rows: int, threads: int, dtype: torch.dtype, bits: int, kinds: list[str], repeats: int) -> None:
    """All shapes for a number of rows and threads."""
    torch.set_num_threads(threads)
    names = ["dense", "torch", "expanded", *(f"{kind} {way}" for kind in kinds for way in WAYS)]
    total = dict.fromkeys(names, (0.0, 0.0))
    print(f"\n{rows} rows, {threads} threads\n{'N':>8}{'K':>8}{'dense s':>10}", *(f"{name:>18}" for name in names[1:]))
    for n, k, count in SHAPES:
        packed, plain = random_levels(n, k, bits), torch.randn(rows, k)
        x, outlying = plain.to(dtype), plain.index_fill(1, torch.randperm(k)[:4], 0)
        outlying = (outlying + 30 * (plain - outlying)).to(dtype)
        weight = dequantize(packed, dtype)
        best = time_in_turn({
            "dense": partial(torch.nn.functional.linear, x, weight),
            "torch": partial(torch_backend.multiply, x, packed),
            "expanded": partial(cpu_backend.multiply_exact, x, packed, cpu_backend.instruction()),
            **{f"{kind} {way}": partial(cpu_backend.multiply_digits, outlying if way == "outliers" else x, packed, kind,
                                        digits) for kind in kinds for way, digits in WAYS.items()}}, repeats)
        total = {name: (total[name][0] + count * best[name][0], total[name][1] + count * best[name][1])
                 for name in names}
        dense = best["dense"][0]
        print(f"{n:>8}{k:>8}{dense:>10.4f}", *(f"{best[name][0] / dense:>18.2f}" for name in names[1:]), flush=True)
    for unit, i in (("wall", 0), ("CPU", 1)):
        dense = total["dense"][i]
        print(f"{f'all 80, {unit}':>16}{dense:>10.2f}", *(f"{total[name][i] / dense:>18.2f}" for name in names[1:]),
              flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 1536, 4608])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--bits", type=int, choices=(1, 2), default=2)
    parser.add_argument("--kinds", nargs="+", default=[cpu_backend.instruction()],
                        help="instructions of the int8 products (ops/backends/cpu/kernels.py)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside this one")
    args = parser.parse_args()
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    print(f"{date.today()}, {cpu_name()}, torch {torch.__version__}, {args.dtype}, {args.bits} bits; "
          f"{args.busy} busy processes beside; dense in seconds, others as multiples of it")
    try:
        for rows in args.rows:
            for threads in args.threads:
                table(rows, threads, DTYPES[args.dtype], args.bits, args.kinds, args.repeats)
                print("load average", *os.getloadavg(), flush=True)
    finally:
        for process in beside:
            process.kill()


if __name__ == "__main__":
    main()
