"""Shared fixtures: small packs in every format from one dense model per variant, and packs to damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import packs
import pytest
import sound_files
from random_model import write_repository

from bonsai_image.loaders.names import to_comfyui

#: tests/host needs a ComfyUI checkout; without one it is left out, and the summary says so.
collect_ignore = [] if os.environ.get("COMFYUI_PATH") else ["host"]


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line("tests/host not run: set COMFYUI_PATH to a ComfyUI checkout to run it")


@pytest.fixture(scope="session", params=[2, 1], ids=["ternary", "binary"])
def small(request, tmp_path_factory) -> SimpleNamespace:
    """``model`` (dense diffusers), ``bits``, and paths: diffusers, sharded, comfyui, gemlite, mlx."""
    bits = request.param
    root: Path = tmp_path_factory.mktemp(f"packs{bits}")
    model = packs.dense_model(bits)
    return SimpleNamespace(
        bits=bits,
        model=model,
        diffusers=packs.write_diffusers(model, root / "unpacked" / "transformer"),
        sharded=packs.write_diffusers(model, root / "sharded" / "transformer", shard="2MB"),
        comfyui=packs.write_comfyui_single(to_comfyui(dict(model.state_dict())), root / "klein.safetensors"),
        gemlite=packs.write_gemlite(model, root / "bonsai-gemlite" / "transformer-gemlite", bits),
        mlx=packs.write_mlx(model, root / "bonsai-mlx" / "transformer-packed-mflux", bits),
    )


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A whole random repository in the layout of the MLX releases."""
    return write_repository(tmp_path_factory.mktemp("repository") / "bonsai-mini")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A folder with every sound pack of ``sound_files.PACKS`` under its name."""
    return sound_files.write_all(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def copy(root, tmp_path) -> Callable[[str], Path]:
    """Copies one of these packs, to be damaged."""
    return lambda name: Path(shutil.copytree(root / name, tmp_path / name))
