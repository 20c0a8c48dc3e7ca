"""What ``benchmarks/gpu_kernels.py`` makes of its times, and the model beside which ``gpu.py`` prints its own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_kernels
import roofline


def table(**factors: float) -> list[dict]:
    """Rows as measured where ``dense`` takes the rows of a product in milliseconds, and every way a multiple of it."""
    return [{"bits": 2, "n": n, "k": k, "rows": rows, "way": way, "ms": rows * factor}
            for n, k in gpu_kernels.LAYERS for rows in gpu_kernels.ROWS for way, factor in factors.items()]


def test_the_products_of_a_step_are_summed():
    steps = gpu_kernels.step_times(table(**{"dense": 1.0, "expanded": 1.25}))
    assert steps["expanded"] == pytest.approx(1.25 * steps["dense"])


@pytest.mark.parametrize("name", roofline.GPUS)
def test_the_model_orders_the_ways(name):
    for size in (512, 1024):
        times = roofline.expected(name, size)
        assert times["dense"] < times["expanded"] < 1.2 * times["dense"]
        # int8 has four times the rate of BF16 on consumer GPUs, twice on the others.
        assert (times["dense"] / times["one digit"] > 1.5) == ("GeForce" in name)
        assert (times["dense"] / times["two digits"] > 1.15) == ("GeForce" in name)
    assert roofline.expected("a GPU that is not listed", 512) is None
