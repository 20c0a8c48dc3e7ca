"""What LoRAs beside packed weights cost on this machine's CPU: all 80 block linears with and without, side by side.

    python benchmarks/lora.py [--rows 1536] [--ranks 16 32 256] [--counts 1 4] [--repeats 5]

Only the linears are timed, so the share of a whole step (which has attention and norms as well) is smaller. Of each
rank, a file for all 80 linears in FP16 is written and loaded as well.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from linear import SHAPES, random_levels
from safetensors.torch import save_file

from bonsai_image.loaders import load_lora
from bonsai_image.loaders.klein import KleinConfig, comfyui_shapes, is_packable
from bonsai_image.ops import backends
from bonsai_image.ops.devices import DTYPES
from bonsai_image.ops.packed import Packed, rewrap
from bonsai_image.ops.side_paths import Adapter, Patch, side_paths


def patches(n: int, k: int, rank: int, count: int) -> list[Patch]:
    return [Patch(Adapter("product", (torch.randn(n, rank).half(), torch.randn(rank, k).half())), 0.7)
            for _ in range(count)]


def once(x: torch.Tensor, packed: Packed, weight: torch.Tensor, paths: tuple) -> float:
    start = time.perf_counter()
    y = backends.multiply(x, packed, backends.AUTO)
    for path in paths:
        path.add(x, y, weight)
    return time.perf_counter() - start


def load(rank: int) -> str:
    """How long a file of this rank takes to load, to the factors that a layer is given."""
    shapes = comfyui_shapes(KleinConfig())
    tensors = {}
    for name, shape in shapes.items():
        if is_packable(name) and len(shape) == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, shape[1]).half()
            tensors[f"{layer}.lora_B.weight"] = torch.randn(shape[0], rank).half()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(tensors, path)
        start = time.perf_counter()
        fitting = load_lora(path).fitting(shapes)
        return (f"rank {rank}: {path.stat().st_size / 1e6:.0f} MB, {len(fitting)} layers loaded in "
                f"{time.perf_counter() - start:.2f} s")


def arithmetic(rank: int) -> float:
    """The products of a LoRA in those of the layers."""
    return sum(count * rank * (n + k) for n, k, count in SHAPES) / sum(count * n * k for n, k, count in SHAPES)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 256])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    cases = [(0, 0), *((rank, count) for rank in args.ranks for count in args.counts)]
    totals = dict.fromkeys(cases, 0.0)
    for n, k, occurrences in SHAPES:
        x = torch.randn(args.rows, k).to(DTYPES[args.dtype])
        packed = random_levels(n, k, 2)
        weight = rewrap(packed, x.dtype)
        paths = {case: side_paths(patches(n, k, *case)) for case in cases}
        best = dict.fromkeys(cases, float("inf"))
        for _ in range(args.repeats):
            for case in cases:
                best[case] = min(best[case], once(x, packed, weight, paths[case]))
        for case in cases:
            totals[case] += occurrences * best[case]
    print(f"{args.rows} rows, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for (rank, count), seconds in totals.items():
        print(f"{count} LoRAs of rank {rank} on 80 linears: {seconds:6.2f} s, {seconds / totals[0, 0]:.3f} of none "
              f"(products: {1 + count * arithmetic(rank):.3f})")
    for rank in args.ranks:
        print(load(rank))


if __name__ == "__main__":
    main()
