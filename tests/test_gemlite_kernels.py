"""GemLite's kernels on the canonical layout, through Triton's interpreter, called as our backend calls them."""

import importlib.util

import pytest

from bonsai_image.tests.support.lab import run_lab

# Not importorskip: importing GemLite asks for a GPU.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gemlite") is None, reason="GemLite is not installed here")


def test_gemlite_reads_canonical_bytes():
    """1, 2 and 4 bits in every form, FP16, BF16 and FP32, few rows and many; no candidate is measured, and Triton's
    allocator is left as it was."""
    cases = run_lab("gemlite_cases.py")
    assert len(cases) == 31
    assert not [case for case in cases if not case["error"] <= case["tolerance"]]
