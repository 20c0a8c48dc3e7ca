"""MLX that is missing, broken or too old: it is named once, and the next backend multiplies."""

import importlib.util
import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bonsai_image.ops import Setting, linear
from bonsai_image.tests.support.reference import random_weight

pytestmark = pytest.mark.usefixtures("fresh_backends")

needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")

_IMPORTS = """
import sys, torch
import bonsai_image.standalone.cli, bonsai_image.loaders
from bonsai_image.ops import Setting, linear, packed_weight
weight = packed_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), 2)
linear(torch.ones(1, 128), weight)
assert not [name for name in sys.modules if name.split(".")[0] == "mlx"], "imported unasked"
linear(torch.ones(1, 128), weight, None, Setting("mlx", "exact"))
assert "mlx.core" in sys.modules, "not imported when asked for"
"""


@needs_mlx
def test_mlx_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_BROKEN_IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import einops, torch
from bonsai_image.ops import Setting, linear, packed_weight
weight = packed_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), 2)
assert linear(torch.ones(1, 128), weight, None, Setting("mlx", "exact")).shape == (1, 8)
assert not [name for name in sys.modules if name.split(".")[0] == "mlx"]
assert einops.rearrange(torch.ones(2, 3), "a b -> b a").shape == (3, 2)
"""


def test_an_mlx_that_cannot_be_imported_leaves_nothing_behind(tmp_path):
    """einops imports the core of whatever is in sys.modules by the name of a framework."""
    pytest.importorskip("einops")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('Failed to load the default metallib')\n")
    done = subprocess.run([sys.executable, "-c", _BROKEN_IMPORT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("failure", ["wrong", "kernel", "bits", "missing"])
def test_a_broken_mlx_is_logged_once_and_the_next_multiplies(failure, monkeypatch, caplog):
    mx = pytest.importorskip("mlx.core")
    product = mx.quantized_matmul

    def broken(x, *args, **kwargs):
        if failure == "kernel":
            raise RuntimeError("[metal::Device] Unable to load kernel affine_qmm_t\nand more")
        if failure == "bits" and kwargs["bits"] == 1:
            raise ValueError("[quantized_matmul] the requested number of bits 1 is not supported")
        # As the miscompiled matrix kernels did: right for a few rows, wrong for many.
        return product(x, *args, **kwargs) * (2 if failure == "wrong" and x.shape[0] > 8 else 1)

    if failure == "missing":
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx" else find(name))
    monkeypatch.setattr(mx, "quantized_matmul", broken)
    monkeypatch.setattr(mx, "__version__", "0.28.0" if failure == "bits" else "99.0")
    weight, x = random_weight(1, "symmetric", 64, 512, 128), torch.randn(20, 512)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(linear(x, weight, None, Setting("mlx", "exact")), linear(x, weight))
    (message,) = [text for text in caplog.messages if "mlx" in text.lower()]
    assert "\n" not in message
    if failure == "missing":
        assert "pip install mlx" in message
    elif failure == "bits":
        assert "mlx 0.28.0 fails" in message and "0.32.4 or newer is needed (pip install --upgrade mlx)" in message
    else:
        assert "--force-reinstall" in message and "macOS to 26.2" in message


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac it would measure")
def test_the_mac_script_refuses_other_machines(monkeypatch, capsys):
    script = Path(__file__).parent.parent / "benchmarks" / "mac.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr()
    assert "Nothing was run" in said.out and not said.err
