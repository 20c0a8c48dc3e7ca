"""Shared fixtures: small model files in every format from one dense model per variant, and some to damage."""

import functools
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bonsai_image.loaders.names import to_comfyui
from bonsai_image.ops import backends
from bonsai_image.ops.backends import selfcheck
from bonsai_image.tests.support import model_files, sound_files
from bonsai_image.tests.support.random_model import write_repository

#: tests/host needs a ComfyUI checkout; without one it is left out, and the summary says so.
collect_ignore = [] if os.environ.get("COMFYUI_PATH") else ["host"]


def pytest_configure(config):
    # One for all processes that the tests start, so that they multiply alike.
    os.environ.setdefault(selfcheck.FILE, str(Path(tempfile.gettempdir()) / f"bonsai-image-{os.getpid()}.json"))
    # pytest-xdist would hand out files with few tests last, which here are the slow ones: one worker would wait.
    config.option.loadscopereorder = False
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: it and what it starts keep to one core
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line("tests/host not run: set COMFYUI_PATH to a ComfyUI checkout to run it")


@pytest.fixture(autouse=True, scope="module")
def like_a_new_process():
    """The collector passes over what is there before a file's tests: half a million objects of libraries, at every one
    of which each collection would look otherwise. A batch leaves its number of threads, which the next file does not
    get: two workers of pytest-xdist would wait for each other's. Left alone where it is the same, for once it has been
    set, LAPACK can wait for a second thread forever inside torch's own parallel loop, as in a batched inverse."""
    gc.collect()
    gc.freeze()
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def fresh_backends(monkeypatch):
    """Verdicts on backends are forgotten before and after: each test asks and checks anew."""
    def forget():
        for forget_all in (backends._problem.cache_clear, backends._log.cache_clear, selfcheck._VERDICTS.clear,
                           selfcheck._times.cache_clear):
            forget_all()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


@dataclass
class Small:
    """A small dense diffusers ``model`` whose block weights take ``bits``, and the paths of its files by format."""

    bits: int
    model: torch.nn.Module
    diffusers: Path
    sharded: Path
    comfyui: Path
    mlx: Path
    root: Path

    @functools.cached_property
    def gemlite(self) -> Path:
        """Written when first asked for: GemLite exists for Linux only."""
        if importlib.util.find_spec("gemlite") is None:
            pytest.skip("GemLite is not installed here")
        return model_files.write_gemlite(self.root / "bonsai-gemlite" / "transformer-gemlite", self.bits)


@pytest.fixture(scope="session", params=[2, 1], ids=["ternary", "binary"])
def small(request, tmp_path_factory) -> Small:
    bits = request.param
    root: Path = tmp_path_factory.mktemp(f"models{bits}")
    model = model_files.dense_model(bits)
    return Small(
        bits, model,
        diffusers=model_files.write_diffusers(model, root / "unpacked" / "transformer"),
        sharded=model_files.write_diffusers(model, root / "sharded" / "transformer", shard="2MB"),
        comfyui=model_files.write_comfyui_single(to_comfyui(dict(model.state_dict())), root / "klein.safetensors"),
        mlx=model_files.write_mlx(model, root / "bonsai-mlx" / "transformer-packed-mflux", bits),
        root=root,
    )


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A whole random repository in the layout of the MLX releases."""
    return write_repository(tmp_path_factory.mktemp("repository") / "bonsai-mini")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A folder with each of ``sound_files.FILES`` in the folder of its name."""
    return sound_files.write_all(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def copy(root, tmp_path) -> Callable[[str], Path]:
    """Copies one of these folders, to be damaged."""
    return lambda name: Path(shutil.copytree(root / name, tmp_path / name))
