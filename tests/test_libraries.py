"""Optional libraries that are missing, old, half removed or broken in any way: one sentence, and the next backend."""

import importlib.metadata
import importlib.util
import logging
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bonsai_image.ops import Setting, backends, linear
from bonsai_image.ops.backends import (
    cpu_backend,
    gemlite_backend,
    libraries,
    mlx_backend,
    selfcheck,
    triton_backend,
)
from bonsai_image.ops.devices import Gpu
from bonsai_image.standalone.batch import pipeline
from bonsai_image.tests.support.reference import random_weight

CPU = torch.device("cpu")
BACKENDS = {backend.LIBRARY.name: backend for backend in (cpu_backend, gemlite_backend, mlx_backend, triton_backend)}
#: Our modules that import a library.
OURS = ("cpu.kernels", "cpu.products", "cpu.llvm", "mlx.arrays", "triton.kernels")
RAISED = ("TypeError('no argument')", "AttributeError('gone')", "OSError('cannot open shared object file')",
          "RuntimeError('no driver')", "ImportError('DLL load failed')", "SystemExit(1)", "KeyError('HOME')",
          "NotImplementedError()", "ValueError('two\\nlines')", "ModuleNotFoundError('No module', name='numpy')")


@pytest.fixture
def stand_in(monkeypatch, tmp_path, fresh_backends):
    """Replaces a library by a folder with ``files``. Gives its backend, which runs on this CPU."""
    def install(name: str, files: dict[str, str]):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        for package, module in (ours.split(".") for ours in OURS):
            monkeypatch.delitem(sys.modules, f"{backends.__name__}.{package}.{module}", raising=False)
            monkeypatch.delattr(sys.modules[f"{backends.__name__}.{package}"], module, raising=False)
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
        monkeypatch.setattr(gemlite_backend, "gpu", lambda _: Gpu("nvidia", "a GPU", (8, 9)))
        cpu_backend.instruction.cache_clear()
        backend = BACKENDS.get(name)
        if backend is not None:
            monkeypatch.setattr(backend, "DEVICES", ("cpu",))
        return backend

    pytest.importorskip("triton")  # GemLite is asked for after it
    monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[0])
    yield install
    cpu_backend.instruction.cache_clear()
    for module in [module for module in sys.modules if (tmp_path / module.partition(".")[0]).is_dir()]:
        del sys.modules[module]


def check(backend, caplog) -> str:
    """The product is right, and one line in the log says why another backend computed it. Gives that line."""
    weight, x = random_weight(2, "symmetric", 64, 512, 128), torch.randn(20, 512)
    expected = linear(x, weight, None, Setting("torch"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert (linear(x, weight, None, Setting(backend.NAME, "exact")) - expected).norm() < 1e-5 * expected.norm()
    (message,) = [text for text in caplog.messages if backend.LIBRARY.name in text]
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("raised", RAISED)
def test_a_library_that_raises_at_import(stand_in, caplog, name, raised):
    backend = stand_in(name, {"__init__.py": f"raise {raised}"})
    message = check(backend, caplog)
    assert f"{name} 0.1 fails on this machine ({raised.split('(')[0]}" in message
    assert f"{backend.LIBRARY.oldest} or newer is needed ({backend.LIBRARY.install})" in message
    assert not [module for module in sys.modules if module.partition(".")[0] == name], "left half imported"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("files", "said"), [
    ({"__init__.py": ""}, "Error: "), ({"__init__.py": "__version__ = '0.2'"}, "0.2 fails on this machine ("),
    ({"__init__.py": "", "binding.py": "", "ir.py": "", "core.py": "", "language.py": ""}, "Error: "),
], ids=["half removed", "with its own version", "without what we use"])
def test_a_library_without_its_parts(stand_in, caplog, name, files, said):
    assert said in check(stand_in(name, files), caplog)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_stands_in_a_library_s_place(stand_in, caplog, monkeypatch, name):
    """As another node pack puts it there, without a spec."""
    backend = stand_in(name, {})
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert "fails on this machine" in check(backend, caplog)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_library_of_which_pip_left_an_empty_folder(stand_in, monkeypatch, tmp_path, name):
    library = stand_in(name, {}).LIBRARY
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.setattr(sys, "meta_path", [PathFinder])
        assert libraries.problem(library).startswith(f"{name} 0.1 fails on this machine (")
    assert name not in sys.modules


@pytest.mark.parametrize("name", BACKENDS)
def test_a_library_that_is_not_there(stand_in, caplog, monkeypatch, name):
    backend, find = stand_in(name, {}), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    assert f"{name} is not installed (pip install " in check(backend, caplog)


def test_versions_that_cannot_be_read(monkeypatch):
    for version in (lambda _: None, lambda _: 1 / 0, lambda _: "unknown", lambda _: "99.0.0.post1+cu128"):
        monkeypatch.setattr(importlib.metadata, "version", version)
        assert "to repair it: x" in libraries.sentence(libraries.Library("x", "x", "1.2", "pip install x", "x"), "y")


def test_versions_are_those_of_the_extras():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups()
                   for name in ("standalone", "batch", "cpu", "gemlite", "mlx")
                   for line in project["optional-dependencies"][name] if ">=" in line)
    allowed["triton"] = allowed.pop("triton-windows")
    for library in (*(backend.LIBRARY for backend in backends.BACKENDS), pipeline.RAY):
        assert library.oldest == allowed[library.name]


@pytest.mark.parametrize("raised", RAISED)
def test_a_broken_ray_is_one_sentence_for_batch(stand_in, raised):
    stand_in("ray", {"__init__.py": f"raise {raised}"})
    with pytest.raises(ValueError, match=r"^ray 0.1 fails .* 2.50 or newer is needed \(pip install"):
        pipeline.start(None, pipeline.Pools(1, 1, 0, 1))
