"""Triton kernels without a GPU: ours and GemLite's through the interpreter, ours compiled for eight architectures."""

import importlib.util

import pytest
import torch

from bonsai_image.ops.backends.triton.backend import WORKSPACE, row_blocks
from bonsai_image.ops.packed import Packed
from bonsai_image.tests.support.lab import run_lab

pytest.importorskip("triton", reason="Triton is not installed here")


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return run_lab("triton_cases.py")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return run_lab("compile_cases.py", *SHARED)


@pytest.mark.parametrize(("prefix", "count"), [("dequantize-", 73), ("exact-", 13), ("quantize-", 3),
                                               ("levels-", 3), ("int8-", 36), ("operator-", 11)])
def test_kernels_agree_with_torch(cases, prefix, count):
    chosen = [case for case in cases if case["name"].startswith(prefix)]
    assert len(chosen) == count
    assert not [case for case in chosen if not case["error"] <= case["tolerance"]]


# Not importorskip: importing GemLite asks for a GPU.
@pytest.mark.skipif(importlib.util.find_spec("gemlite") is None, reason="GemLite is not installed here")
def test_gemlite_reads_canonical_bytes():
    """1, 2 and 4 bits in every form, FP16, BF16 and FP32, few rows and many; no candidate is measured, and Triton's
    allocator is left as it was."""
    cases = run_lab("gemlite_cases.py")
    assert len(cases) == 31
    assert not [case for case in cases if not case["error"] <= case["tolerance"]]


#: Shared memory of a block in KB: 64 on Turing and AMD's, 163 on A100, 99 on consumer GPUs since Ampere, 227 on Hopper.
SHARED = {"75": 64, "80": 163, "86": 99, "89": 99, "90": 227, "120": 99, "gfx942": 64, "gfx1100": 64}
#: Bytes that a thread stores at once, at least; single ones are the scales of rows and groups.
STORES = {"expand": 16, "levels": 8, "quantize": 8, "int8": 8}


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_without_a_gpu(compiled, arch):
    built = {case["name"]: case for case in compiled if case["arch"] == arch}
    assert len(built) == (4 if arch == "75" else 12)  # before Ampere, the exact kernels alone
    if arch == "gfx1100":  # int8 activations are never used there; the product spills
        built = {name: case for name, case in built.items() if not name.startswith("int8")}
    for name, case in built.items():
        kind = "levels" if name.endswith("levels") else name.split("-")[0]
        assert case["code"] and case["spilled"] == 0, name
        assert case["shared"] <= SHARED[arch] * 1024, name
        wide = [size for size in case["stores"] if size >= STORES[kind]]
        assert wide and (len(wide) == len(case["stores"]) or kind in ("levels", "quantize")), name
        if kind == "int8":
            assert case["matrix"], "int8 products must run on matrix units"
            assert case["converted"] == 0, "a sum is read as a float, not converted"
    # Bit-exactness rests on it: the reference rounds a product before it adds, and so does the rounding to int8 (which
    # AMD's division hides).
    assert built["expand-4-affine"]["fma"] == 0
    assert "quantize-2" not in built or built["quantize-2"]["fma"] == 0 or arch.startswith("gfx")


@pytest.mark.parametrize(("n", "k", "itemsize", "blocks"), [
    (27648, 3072, 2, 1), (3072, 12288, 2, 1), (27648, 3072, 1, 1), (27648, 3072, 4, 2), (9728, 2560, 2, 1),
    (5, 64, 2, 1)])
def test_the_workspace_is_bounded(n, k, itemsize, blocks):
    """Every layer of the model is expanded in one piece in 16 bits, and nothing larger than the limit ever is."""
    packed = Packed(torch.empty(n, k // 4, dtype=torch.uint8, device="meta"), torch.empty(n, 1), None, 2, "symmetric")
    parts = row_blocks(packed, itemsize, WORKSPACE)
    assert len(parts) == blocks
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(n))
    assert max(part.stop - part.start for part in parts) * k * itemsize <= 200e6
