"""On which machines MLX multiplies, and what happens where it is broken."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import random_weight

from bonsai_image.ops import accelerator, backends, torch_backend
from bonsai_image.ops.mlx import backend as mlx_backend

needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")


@needs_mlx
@pytest.mark.parametrize(("backend", "device", "machine", "expected"), [
    ("auto", "cpu", "x86_64", "torch"), ("auto", "cuda", "x86_64", "torch"), ("auto", "cpu", "arm64", "torch"),
    ("auto", "mps", "x86_64", "torch"), ("auto", "mps", "arm64", "mlx"), ("mlx", "cpu", "x86_64", "mlx"),
    ("torch", "mps", "arm64", "torch")])
def test_resolve(backend, device, machine, expected, monkeypatch):
    monkeypatch.setattr(mlx_backend.platform, "machine", lambda: machine)
    monkeypatch.setattr(accelerator, "TRITON_INSTALLED", False)
    assert backends.resolve(backend, torch.device(device)) == expected


_IMPORTS = """
import sys, torch
import bonsai_image.standalone.cli, bonsai_image.loaders
from bonsai_image.ops import backends
from bonsai_image.ops.packed import packed_weight
weight = packed_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), 2)
backends.linear(torch.ones(1, 128), weight, None, "auto")
assert not [name for name in sys.modules if name.split(".")[0] == "mlx"], "imported unasked"
backends.linear(torch.ones(1, 128), weight, None, "mlx")
assert "mlx.core" in sys.modules, "not imported when asked for"
"""


@needs_mlx
def test_mlx_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh_verdict():
    for verdict in (mlx_backend.problem, mlx_backend.available):
        verdict.cache_clear()
    yield
    for verdict in (mlx_backend.problem, mlx_backend.available):
        verdict.cache_clear()


@needs_mlx
def test_the_self_check_passes_here():
    assert mlx_backend.problem() is None


@pytest.mark.parametrize("failure", ["wrong", "import", "kernel", "bits", "missing"])
def test_a_broken_mlx_is_named_once_and_torch_serves(failure, fresh_verdict, monkeypatch, caplog):
    mx = pytest.importorskip("mlx.core")
    from bonsai_image.ops.mlx import arrays as mlx_arrays

    product = mx.quantized_matmul

    def broken(x, *args, **kwargs):
        if failure == "kernel":
            raise RuntimeError("[metal::Device] Unable to load kernel affine_qmm_t")
        if failure == "bits" and kwargs["bits"] == 1:
            raise ValueError("[quantized_matmul] the requested number of bits 1 is not supported")
        # As the miscompiled matrix kernels did: right for a few rows, wrong for many.
        return product(x, *args, **kwargs) * (2 if failure == "wrong" and x.shape[0] > 8 else 1)

    if failure == "missing":
        monkeypatch.setattr(mlx_backend.importlib.util, "find_spec", lambda name: None)
    elif failure == "import":
        def unloadable():
            raise ImportError("Failed to load the default metallib. library not found\nlibrary not found")

        monkeypatch.setattr(mlx_arrays, "self_check_error", unloadable)
    monkeypatch.setattr(mx, "quantized_matmul", broken)
    weight, x = random_weight(1, "symmetric", 64, 512, 128), torch.randn(20, 512)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(backends.linear(x, weight, None, "mlx"), torch_backend.linear(x, weight, None))
    (message,) = [record.getMessage() for record in caplog.records if "MLX" in record.getMessage()]
    assert "\n" not in message and "torch serves" in message
    if failure == "missing":
        assert "pip install mlx" in message
    elif failure == "bits":
        assert "is too old" in message and "pip install --upgrade mlx" in message
    else:
        assert "--force-reinstall" in message and "update macOS" in message


@pytest.mark.skipif(mlx_backend.is_apple_silicon(torch.device("mps")), reason="on a Mac it would measure")
def test_the_mac_script_refuses_other_machines():
    script = Path(__file__).parent.parent / "benchmarks" / "mac.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Nothing was run" in done.stdout and not done.stderr
