"""``bonsai-image doctor``: one page that a bug report needs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bonsai_image.miniature import demo
from bonsai_image.ops import backends
from bonsai_image.ops.devices import default_dtype
from bonsai_image.ops.packed import parts
from bonsai_image.standalone import cli, doctor
from bonsai_image.tests.support.reference import random_weight


@pytest.fixture
def program(tmp_path) -> Path:
    """Where the nodes lie in a ComfyUI that has the miniature, a repository cut short and a file of ours."""
    diffusers = tmp_path / "models" / "diffusers"
    shutil.copytree(demo.MINIATURE / "ternary", diffusers / "bonsai-mini")
    (diffusers / "broken" / "transformer").mkdir(parents=True)
    (diffusers / "broken" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    (tmp_path / "models" / "diffusion_models").mkdir()
    shutil.copy(demo.MINIATURE / "binary.safetensors", tmp_path / "models" / "diffusion_models" / "bonsai.safetensors")
    (tmp_path / "models" / "diffusion_models" / "other.safetensors").touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.29.0"\n')
    return tmp_path / "custom_nodes" / "bonsai-image"


def test_it_finds_comfyui_its_version_and_the_models(program, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # PyPI's metadata would say 2.13.0
    found = doctor.diagnose(program)
    assert found["versions"]["ComfyUI"] == "0.29.0" and found["versions"]["torch"] == "2.13.0+cu130"
    models = {Path(model["path"]).relative_to(program.parent.parent / "models").as_posix(): model
              for model in found["models"]}
    assert "diffusion_models/bonsai.safetensors" in models and "diffusion_models/other.safetensors" not in models
    assert models["diffusers/bonsai-mini/vae/diffusion_pytorch_model.safetensors"]["published"] is None
    assert "problem" in models["diffusers/broken"]
    page = doctor.report(found)
    assert "ComfyUI 0.29.0" in page and models["diffusers/broken"]["problem"] in page


def test_backends_are_the_ones_that_are_used(program):
    cpu = doctor.diagnose(program)["devices"][0]
    assert cpu["device"] == "cpu"
    cpu_device, dtype = torch.device("cpu"), default_dtype(torch.device("cpu"))
    named = backends.choose(backends.AUTO, cpu_device, 4608, parts(random_weight(2, "symmetric", 64, 256, 128)), dtype)
    assert cpu["backends"]["exact"]["ternary"] == str(named)


def test_a_backend_that_is_missing_is_named_with_what_to_do(program, monkeypatch, fresh_backends):
    why = "llvmlite is not installed (pip install llvmlite)"
    missing = next(backend for backend in backends.BACKENDS if backend.NAME == "cpu")
    monkeypatch.setattr(missing, "problem", lambda device, fast=False: why)
    found = doctor.diagnose(program)
    assert found["devices"][0]["backends"]["exact"]["ternary"] == "torch"
    assert "slow: CPU: llvmlite is not installed (pip install llvmlite)" in doctor.report(found)


def test_the_command(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["bonsai-image"] and found["models"] == []
    assert cli.main(["doctor"]) == 0
    assert "no Bonsai Image model found" in capsys.readouterr().out
