"""The rules of the house that a program can check: imports, file sizes, lint, packaging, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"ops": set(), "loaders": {"ops"}, "networks": {"loaders", "ops"}, "nodes": {"networks", "loaders", "ops"},
         "standalone": {"networks", "loaders", "ops"}}
HOST = {"comfy", "folder_paths", "comfy_api", "comfy_extras", "comfy_execution", "server", "execution", "node_helpers"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path):
    """(dots, module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if not node.module else [node.module]
            yield from ((node.level, name) for name in names)


def check_imports(path: Path, root: Path) -> None:
    """The rule, for a file that lies at any depth in a room of ``root``."""
    room, *folders = path.relative_to(root).parts[:-1]
    for dots, module in imports(path):
        first = module.split(".")[0]
        assert dots <= len(folders) + 2, f"{module} reaches above the pack"
        if dots == len(folders) + 2 and first in ROOMS:
            assert first in ROOMS[room], f"{room} imports {first}"
        assert dots > 0 or first != "bonsai_image", "imports inside the pack are relative"
        assert room == "nodes" or dots > 0 or first not in HOST, f"{room} imports the host"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_import_directions(path):
    check_imports(path, ROOT)


@pytest.mark.parametrize(("name", "line"), [
    ("ops/bad.py", "from ..loaders import ModelFileError"),
    ("ops/backends/bad.py", "from ...loaders import ModelFileError"),
    ("loaders/formats/bad.py", "from ... import nodes"),
    ("loaders/formats/bad.py", "import comfy.sd"),
    ("loaders/formats/bad.py", "from bonsai_image.ops import packed"),
    ("nodes/bad.py", "from ...other_pack import nodes"),
])
def test_import_rule_can_fail(tmp_path, name, line):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    with pytest.raises(AssertionError):
        check_imports(path, tmp_path)


def needs(path: Path, root: Path) -> set[Path]:
    """The files of the package that importing ``path`` imports; imports inside functions come later."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [folder / alias.name for alias in node.names] if not folder.with_suffix(".py").exists() else []
            for module in (folder, *names):
                found |= {file for file in (module.with_suffix(".py"), module / "__init__.py")
                          if file.exists() and root in file.parents}
    return found - {path}


def circle(files: list[Path], root: Path) -> list[Path]:
    """Some files that import each other in a circle; none if there are none."""
    graph = {path: needs(path, root) & set(files) for path in files}
    while leaves := [path for path, used in graph.items() if not used]:
        graph = {path: used - set(leaves) for path, used in graph.items() if path not in leaves}
    return sorted(graph)


def test_no_import_circles(tmp_path):
    # A package's __init__ imports its modules, and they import each other through it; that is no circle of files.
    modules = [path for path in FILES if path.name != "__init__.py"]
    assert not circle(modules, ROOT)
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("from . import other\n")
    other.write_text("from .one import x\n")
    assert circle([one, other], tmp_path) == [one, other]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    long = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= 50]
    assert not long


def test_an_installation_has_every_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.relative_to(ROOT).parent.as_posix().replace("/", ".") for path in FILES}
    assert set(settings["packages"]) == {"bonsai_image"} | {f"bonsai_image.{folder}" for folder in folders}


@pytest.mark.style
def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_importing_the_package_imports_no_torch_and_no_comfyui():
    code = "import sys, bonsai_image; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'comfy', 'mlx'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_the_others_have(path):
    """They are not run here, so a name that is gone would show only when somebody measures."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (source := path.with_name(f"{node.module}.py")).exists():
            tree = ast.parse(source.read_text(encoding="utf-8"))
            names = {getattr(child, "name", None) for child in tree.body}
            names |= {target.id for child in tree.body if isinstance(child, ast.Assign) for target in child.targets
                      if isinstance(target, ast.Name)}
            assert {alias.name for alias in node.names} <= names, source.name
