"""The examples of docs/library.md run, print what they say, and use nothing but the public interface."""

import ast
import re
import runpy
from pathlib import Path

from bonsai_image import loaders, ops

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
EXAMPLES = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))


def test_library_examples_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples.py").write_text(EXAMPLES, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(tmp_path / "examples.py"))
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\) +# (.*)", EXAMPLES)
    assert len(promised) == 7
    assert all(any(promise.startswith(line) for line in printed) for promise in promised), printed


def test_library_examples_use_the_public_interface_only():
    public = {"bonsai_image.loaders": loaders.__all__, "bonsai_image.ops": ops.__all__}
    used = {(node.module, alias.name) for node in ast.walk(ast.parse(EXAMPLES)) if isinstance(node, ast.ImportFrom)
            for alias in node.names if node.module and node.module.startswith("bonsai_image")}
    assert {module for module, _ in used} == public.keys()
    assert all(name in public[module] for module, name in used)


def test_public_names_exist():
    for module in (loaders, ops):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
