"""The rules of the house that a program can check: import directions, lint, what importing the pack costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"ops": set(), "loaders": {"ops"}, "nodes": {"loaders", "ops"}, "standalone": {"loaders", "ops"}}
HOST = {"comfy", "folder_paths", "comfy_api", "comfy_extras", "comfy_execution", "server", "execution", "node_helpers"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))


def imports(path: Path):
    """(dots, module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if not node.module else [node.module]
            yield from ((node.level, name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_import_directions(path):
    room = path.parent.name
    for dots, module in imports(path):
        first = module.split(".")[0]
        assert dots < 3, f"{module} reaches above the pack"
        if dots == 2 and first in ROOMS:
            assert first in ROOMS[room], f"{room} imports {first}"
        assert dots > 0 or first != "bonsai_image", "imports inside the pack are relative"
        assert room == "nodes" or dots > 0 or first not in HOST, f"{room} imports the host"


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "ops"
    bad.mkdir()
    (bad / "bad.py").write_text("from ..loaders import PackError\n")
    with pytest.raises(AssertionError):
        test_import_directions(bad / "bad.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_importing_the_pack_imports_no_torch_and_no_host():
    code = "import sys, bonsai_image; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'comfy', 'mlx'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
