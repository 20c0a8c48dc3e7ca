"""``bonsai-image doctor``: one page that a bug report needs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bonsai_image.miniature import demo
from bonsai_image.ops import backends
from bonsai_image.ops.devices import default_dtype
from bonsai_image.ops.packed import unwrap
from bonsai_image.standalone import cli, comfyui, doctor
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


class Layouts:
    """Ways to lay out ComfyUI: each makes one below ``root`` and gives the folder of the pack as ``doctor`` is called,
    and a folder that ComfyUI lists as one of diffusion models."""

    @staticmethod
    def _data(base: Path) -> Path:
        for folder in ("models/diffusion_models", "custom_nodes/bonsai-image", "user"):
            (base / folder).mkdir(parents=True)
        (base / "user" / "comfyui.log").write_text("[START] Security\n[2026-11-28] ComfyUI version: 0.41.2\n")
        return base

    def base_directory(self, root, monkeypatch):
        base = self._data(root / "data")
        return base / "custom_nodes" / "bonsai-image", base / "models" / "unet"

    def linked_pack(self, root, monkeypatch):
        base = self._data(root / "ComfyUI")
        (base / "custom_nodes" / "bonsai-image").rename(root / "clone")
        (base / "custom_nodes" / "bonsai-image").symlink_to(root / "clone", target_is_directory=True)
        self._data(root / "another")
        monkeypatch.chdir(root / "another")
        monkeypatch.setattr(sys, "prefix", str(base / ".venv"))
        return root / "clone", base / "models" / "diffusion_models"

    def linked_custom_nodes(self, root, monkeypatch):
        base = self._data(root / "ComfyUI")
        (base / "custom_nodes").rename(root / "custom_nodes")
        (base / "custom_nodes").symlink_to(root / "custom_nodes", target_is_directory=True)
        monkeypatch.chdir(base)
        return root / "custom_nodes" / "bonsai-image", base / "models" / "diffusion_models" / "below"

    def custom_nodes_elsewhere(self, root, monkeypatch):
        base = self._data(root / "ComfyUI")
        (base / "custom_nodes").rename(root / "packs")
        (base / "extra_model_paths.yaml").write_text(
            "a1111:\nmine:\n  base_path: ..\n  is_default: true\n  custom_nodes: packs\n"
            "  unet: |\n    sd/unet\n    sd/more\n")
        monkeypatch.setattr(sys, "prefix", str(root / "python_embeded"))
        return root / "packs" / "bonsai-image", root / "sd" / "more"

    def _desktop(self, root, monkeypatch, platform, folder, name):
        base = self._data(root / "Documents" / "ComfyUI")
        settings = root / folder
        (settings / "logs").mkdir(parents=True)
        (base / "user" / "comfyui.log").rename(settings / "logs" / "comfyui.log")
        (settings / "config.json").write_text(json.dumps({"basePath": str(base), "installState": "installed"}))
        (settings / name).write_text(f"comfyui_desktop:\n  base_path: {base}\n  is_default: \"true\"\n  custom_nodes: "
                                     f"custom_nodes/\nbig:\n  diffusion_models: {root / 'big'}/\n")
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("APPDATA", str(root / "Roaming"))
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        (base / "custom_nodes" / "bonsai-image").rename(root / "clone")
        (base / "custom_nodes" / "bonsai-image").symlink_to(root / "clone", target_is_directory=True)
        return root / "clone", root / "big"

    def desktop_on_windows(self, root, monkeypatch):
        return self._desktop(root, monkeypatch, "win32", "Roaming/ComfyUI", "extra_models_config.yaml")

    def desktop_on_macos(self, root, monkeypatch):
        return self._desktop(root, monkeypatch, "darwin", "Library/Application Support/ComfyUI",
                             "extra_models_config.yaml")

    def desktop_on_linux(self, root, monkeypatch):
        return self._desktop(root, monkeypatch, "linux", ".config/ComfyUI", "extra_models_config.yaml")

    def newer_desktop(self, root, monkeypatch):
        return self._desktop(root, monkeypatch, "win32", "Roaming/Comfy Desktop", "shared_model_paths.yaml")


@pytest.mark.parametrize("layout", [name for name in vars(Layouts) if name[0] != "_"])
def test_it_finds_comfyui_in_every_layout(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    program, listed = getattr(Layouts(), layout)(tmp_path, monkeypatch)
    listed.mkdir(parents=True, exist_ok=True)
    shutil.copy(demo.MINIATURE / "binary.safetensors", listed / "bonsai.safetensors")
    base = comfyui.find(program)
    assert base is not None and comfyui.version(base) == "0.41.2"
    assert [model["path"] for model in doctor._models(base)] == [str(listed / "bonsai.safetensors")]


def test_a_list_that_cannot_be_read_hides_no_model(program):
    (program.parent.parent / "extra_model_paths.yaml").write_text("comfyui: [a, b]\n")
    problems = [model["problem"] for model in doctor._models(program.parent.parent) if "problem" in model]
    assert any("extra_model_paths.yaml: expected lists of model folders" in text for text in problems)
    assert any(model["path"].endswith("bonsai.safetensors") for model in doctor._models(program.parent.parent))


def test_backends_are_the_ones_that_are_used(program):
    cpu = doctor.diagnose(program)["devices"][0]
    assert cpu["device"] == "cpu"
    cpu_device, dtype = torch.device("cpu"), default_dtype(torch.device("cpu"))
    weight = unwrap(random_weight(2, "symmetric", 64, 256, 128))
    named = backends.choose(backends.EXACT, cpu_device, 4608, weight, dtype)
    assert cpu["backends"]["exact"]["ternary"] == str(named)


def test_a_backend_that_is_missing_is_named_with_what_to_do(program, monkeypatch, fresh_backends):
    why = "llvmlite is not installed (pip install llvmlite)"
    missing = next(backend for backend in backends.BACKENDS if backend.NAME == "cpu")
    monkeypatch.setattr(missing, "problem", lambda device, digits=0: why)
    found = doctor.diagnose(program)
    assert found["devices"][0]["backends"]["exact"]["ternary"] == "torch"
    assert "slow: CPU: llvmlite is not installed (pip install llvmlite)" in doctor.report(found)


def test_the_command(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["bonsai-image"] and found["models"] == []
    assert cli.main(["doctor"]) == 0
    assert "no Bonsai Image model found" in capsys.readouterr().out


def test_measured_products_are_a_table_to_paste(program, monkeypatch):
    monkeypatch.setattr(doctor, "_SHAPES", ((64, 256, 5), (128, 128, 20)))
    monkeypatch.setattr(doctor, "_ROWS", 16)
    page = doctor.report(doctor.diagnose(program, measure=True))
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["| N x K, 16 rows", "| 64 x 256", "| 128 x 128", "| step"]
    assert lines[0][1:3] == ["dense", "cpu"] or lines[0][1:3] == ["dense", "torch |"]
    assert all(float(cell.strip(" |")) > 0 for line in lines[1:] for cell in line[2:])
