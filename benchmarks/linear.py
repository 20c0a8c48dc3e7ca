"""Packed against dense linears on this machine's CPU, side by side: time ratio per layer shape and row count.

    python benchmarks/linear.py [--rows 1024 1536 4608] [--repeats 5] [--dtype bf16]

The shapes are the distinct block linears of FLUX.2 Klein 4B under ComfyUI's names. Each pair is timed in turn, and the
ratio is that of the best times; the mean weighs a shape by how often the model has it.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from bonsai_image.ops import torch_backend
from bonsai_image.ops.devices import DTYPES
from bonsai_image.ops.packed import pack_codes, packed_weight, parts

#: (N, K, occurrences in one forward).
SHAPES = ((9216, 3072, 10), (3072, 3072, 10), (18432, 3072, 10), (3072, 9216, 10), (27648, 3072, 20), (3072, 12288, 20))


def random_ternary(n: int, k: int):
    levels = torch.randint(0, 3, (n, k), dtype=torch.uint8)
    return packed_weight(pack_codes(levels, 2), (torch.rand(n, k // 128) + 0.5).bfloat16(), 2)


def best(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 1536, 4608])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}")
    print(f"{'rows':>6}{'N':>8}{'K':>8}{'dense s':>10}{'packed s':>10}{'ratio':>8}")
    for rows in args.rows:
        total = {"dense": 0.0, "packed": 0.0}
        for n, k, count in SHAPES:
            weight = random_ternary(n, k)
            dense, packed = weight.to(dtype=dtype).dequantize(), parts(weight)
            x = torch.randn(rows, k).to(dtype)
            pair = {"dense": float("inf"), "packed": float("inf")}
            for _ in range(args.repeats):
                pair["dense"] = min(pair["dense"], best(lambda x=x, w=dense: torch.nn.functional.linear(x, w), 1))
                pair["packed"] = min(pair["packed"], best(lambda x=x, w=packed: torch_backend.multiply(x, w), 1))
            for name in total:
                total[name] += count * pair[name]
            print(f"{rows:>6}{n:>8}{k:>8}{pair['dense']:>10.3f}{pair['packed']:>10.3f}"
                  f"{pair['packed'] / pair['dense']:>8.2f}", flush=True)
        print(f"{rows:>6}{'all 80 linears':>16}{total['dense']:>10.1f}{total['packed']:>10.1f}"
              f"{total['packed'] / total['dense']:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
