"""What LoRAs beside packed weights cost on this machine's CPU: all 80 block linears with and without, side by side.

    python benchmarks/lora.py [--rows 1536] [--rank 16] [--counts 1 4] [--repeats 5]

Only the linears are timed, so the share of a whole step (which has attention and norms as well) is smaller.
"""

import argparse
import time

import torch
from linear import SHAPES, random_levels

from bonsai_image.ops import backends
from bonsai_image.ops.devices import DTYPES
from bonsai_image.ops.packed import Packed, rewrap
from bonsai_image.ops.side_paths import Patch, lora, side_paths


def patches(n: int, k: int, rank: int, count: int) -> list[Patch]:
    return [Patch(lora(torch.randn(n, rank).half(), torch.randn(rank, k).half()), 0.7) for _ in range(count)]


def once(x: torch.Tensor, packed: Packed, weight: torch.Tensor, paths: tuple) -> float:
    start = time.perf_counter()
    y = backends.multiply(x, packed, backends.AUTO)
    for path in paths:
        path.add(x, y, weight)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    totals = dict.fromkeys([0, *args.counts], 0.0)
    for n, k, occurrences in SHAPES:
        x = torch.randn(args.rows, k).to(DTYPES[args.dtype])
        packed = random_levels(n, k, 2)
        weight = rewrap(packed, x.dtype)
        paths = {count: side_paths(patches(n, k, args.rank, count))
                 for count in totals}
        best = dict.fromkeys(totals, float("inf"))
        for _ in range(args.repeats):
            for count in totals:
                best[count] = min(best[count], once(x, packed, weight, paths[count]))
        for count in totals:
            totals[count] += occurrences * best[count]
    print(f"{args.rows} rows, rank {args.rank}, {args.dtype}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    for count, seconds in totals.items():
        print(f"{count} LoRAs on 80 linears: {seconds:6.2f} s, {seconds / totals[0]:.3f} of none")


if __name__ == "__main__":
    main()
