"""How packed weights are multiplied on a GPU, by its name: what can be chosen, and what is chosen until it is measured.

``python benchmarks/gpu_kernels.py`` times every candidate on the GPU at hand and prints the line for :data:`MEASURED`.
"""

from typing import NamedTuple

import torch

from ..devices import gpu


class Tile(NamedTuple):
    """The part of the result that one program of the int8 product computes, and how it is launched."""

    m: int
    n: int
    warps: int
    stages: int = 3


class Tuning(NamedTuple):
    """``workspace``: bytes of the dense copy at most. ``gemlite_rows``: rows up to which GemLite is the fastest."""

    tile: Tile
    workspace: int
    gemlite_rows: int


#: The tiles that compile without spilling registers; 128 x 256, 256 x 128, and 128 x 128 on 4 warps spill. The first
#: reads the least from L2, but fills a multiprocessor with one block, which cannot convert sums while another
#: multiplies; the others leave room for two blocks and read half as much again.
TILES = (Tile(128, 128, 8), Tile(64, 128, 4), Tile(128, 64, 4))

#: The largest layer of FLUX.2 Klein 4B (27648 x 3072) is 170 MB in BF16: 200 MB hold each in one piece, and its product
#: fills the GPU. A copy of a quarter of that stays in a large L2 cache (RTX 4090: 72 MB, 5090: 96, H100: 50), where the
#: product reads it without going to memory, but each of the smaller products has a tail of idle multiprocessors.
WORKSPACES = (200_000_000, 100_000_000, 50_000_000, 25_000_000)

#: The least traffic and the fewest launches. GemLite has kernels for up to 64 rows, where reading the weight is the
#: bound; its author measured its others slower than a dense product.
DEFAULT = Tuning(TILES[0], WORKSPACES[0], 64)

#: Device name as torch reports it -> what was measured best.
MEASURED: dict[str, Tuning] = {}


def tuning(device: torch.device) -> Tuning:
    """What is measured best on ``device``, or :data:`DEFAULT`."""
    return MEASURED.get(gpu(device).name, DEFAULT) if device.type in ("cuda", "xpu") else DEFAULT
