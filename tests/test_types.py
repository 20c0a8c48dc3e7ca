"""Type checks: mypy on ops and loaders, pyright on nodes. Neither needs a ComfyUI or a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.style

ROOT = Path(__file__).parent.parent
#: A mistake that mypy must find, or it has checked nothing.
PLANTED = """\
from bonsai_image.loaders import load_transformer
from bonsai_image.ops import is_packed

wrong: int = [is_packed(tensor) for tensor in load_transformer("x").tensors.values()]
"""


def report(*command: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | environment)
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="links a folder; the result is the same on every system")
def test_mypy_finds_nothing_in_ops_and_loaders(tmp_path):
    # Under the package's own name, whatever the clone is called.
    (tmp_path / "bonsai_image").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    found = report("mypy", "--config-file", str(ROOT / "pyproject.toml"), "--package", "bonsai_image.ops",
                   "--package", "bonsai_image.loaders", "--module", "planted", MYPYPATH=str(tmp_path))
    assert "Found 1 error in 1 file" in found and "planted.py:4: error: " in found, found


def test_pyright_finds_nothing_in_nodes():
    found = report("pyright", "--pythonpath", sys.executable, PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    assert found.startswith("0 errors"), found
