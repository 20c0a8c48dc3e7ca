"""What ``benchmarks/gpu_kernels.py`` makes of its times, and the model beside which ``gpu.py`` prints its own."""

import sys
from pathlib import Path

import pytest

from bonsai_image.ops.backends import tuning

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_kernels
import roofline


def table(**factors: float) -> list[dict]:
    """Rows as measured where ``dense`` takes the rows of a product in milliseconds, and every way a multiple of it."""
    return [{"bits": 2, "n": n, "k": k, "rows": rows, "way": way, "ms": rows * factor}
            for n, k in gpu_kernels.LAYERS for rows in gpu_kernels.ROWS for way, factor in factors.items()
            if rows >= 65 or not way.startswith("int8")]


def test_the_best_of_each_is_entered():
    times = table(**{"dense": 1.0, "torch": 2.0, "gemlite": 1.5, "exact 200 MB": 1.1, "exact 50 MB": 1.05,
                     "int8 128x128": 0.6, "int8 64x128": 0.5, "int8 128x64": 0.7})
    for row in times:
        if row["way"] == "gemlite" and row["rows"] <= 16:
            row["ms"] = 0
    assert gpu_kernels.line(times, "GPU") == f'    "GPU": Tuning({tuning.TILES[1]}, 50000000, 16),'


def test_a_limit_that_does_not_cut_a_layer_counts_with_the_larger_one():
    times = [row for row in table(**{"dense": 1.0, "exact 200 MB": 1.1, "exact 50 MB": 1.0})
             if row["way"] != "exact 50 MB" or (row["n"], row["k"]) in roofline.SINGLE]
    steps = gpu_kernels.step_times(times)
    assert steps["dense"] < steps["exact 50 MB"] < steps["exact 200 MB"]


@pytest.mark.parametrize("name", roofline.GPUS)
def test_the_model_orders_the_ways(name):
    for size in (512, 1024):
        times = roofline.expected(name, size)
        assert times["dense"] < times["exact"] < 1.2 * times["dense"]
        # int8 has four times the rate of BF16 on consumer GPUs, twice on the others.
        assert (times["dense"] / times["fast"] > 1.5) == ("GeForce" in name)
    assert roofline.expected("a GPU that is not listed", 512) is None
