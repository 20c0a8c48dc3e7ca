"""The command line, end to end on small models."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bonsai_image.__main__ import main
from bonsai_image.standalone import cli, options
from bonsai_image.standalone.generate import compute_of, device_named
from bonsai_image.tests.support.command_line import BINARY, MINIATURE, SMALL, run, sentence

DRAW = ("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "two green circles", "--steps", 1, *SMALL,
        "--json", "--out")


def test_default_device_without_a_gpu_is_the_cpu(monkeypatch):
    """PyTorch built for CUDA names CUDA, unless it is asked to check."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: None if check_available else torch.device("cuda"))
    assert device_named(None) == torch.device("cpu")


@pytest.mark.parametrize("raised", [
    "ModuleNotFoundError('gone', name='diffusers')", "ImportError('DLL load failed')", "OSError('no shared object')",
    "TypeError('x')", "RuntimeError('two\\nlines')", "SystemExit(3)", "ValueError('binary incompatibility')", ""])
def test_only_drawing_needs_diffusers(repository, monkeypatch, capsys, tmp_path, raised):
    """As in a Python that runs ComfyUI, which does not install it, or another of its release."""
    for name in [name for name in sys.modules if name.startswith("bonsai_image.standalone")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text(raised and f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bonsai-image", "inspect", str(repository)])
    assert main() == 0
    assert "diffusion model, mlx format, ternary" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bonsai-image", "generate", "--checkpoint", str(repository), "--prompt", "x"])
    assert main() == 2
    fault = "has no" if raised.startswith("Module") else "cannot import"
    said = capsys.readouterr().err
    assert said.startswith(f"bonsai-image: {sys.executable} {fault} diffusers (") and said.count("\n") == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Image.Image:
    """The image of :data:`DRAW`."""
    out = tmp_path_factory.mktemp("plain") / "plain.png"
    assert run(*DRAW, out) == 0
    return Image.open(out)


def test_generate_is_reproducible_and_records_its_settings(plain, tmp_path, capsys):
    assert run(*DRAW, tmp_path / "again.png", "--prompt", "two green circles") == 0
    again = Image.open(tmp_path / "again.png")
    assert again.tobytes() == plain.tobytes() and again.size == (64, 64)
    settings = json.loads(again.text["bonsai"])
    assert {name: settings[name] for name in ("prompt", "seed", "steps", "variant")} == {
        "prompt": "two green circles", "seed": 0, "steps": 1, "variant": "ternary"}
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages.keys() == {"load text encoder", "encode prompt", "load diffusion model", "load VAE", "denoise",
                             "decode image"}
    assert all(stage["seconds"] > 0 and stage["megabytes"] > 0 for stage in stages.values())


@pytest.mark.parametrize(("option", "value"), [("prompt", "ein rotes Bäumchen"), ("seed", 7), ("steps", 2),
                                               ("image", "reference.png"), ("transformer", BINARY)],
                         ids=["prompt", "seed", "steps", "image", "transformer"])
def test_option_changes_the_image(plain, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("reference.png")
    assert run(*DRAW, "a.png", f"--{option}", value) == 0
    image = Image.open("a.png")
    assert image.tobytes() != plain.tobytes()
    settings = json.loads(image.text["bonsai"])
    assert settings.get(option, value) == value
    assert settings["variant"] == ("binary" if option == "transformer" else "ternary")


def test_backend_and_precision_reach_the_setting():
    args = options.sampling_options().parse_args(["--backend", "triton", "--precision", "fast"])
    assert compute_of(args).setting == ("triton", "fast")


def test_inspect_describes_a_repository(repository, capsys):
    assert run("inspect", repository, "--json") == 0
    parts = {part["kind"]: part for part in json.loads(capsys.readouterr().out)}
    assert parts.keys() == {"diffusion model", "text encoder", "VAE"}
    model = parts["diffusion model"]
    assert (model["variant"], model["format"], model["problems"]) == ("ternary", "mlx", [])
    assert model["packing"] == [{"bits": 2, "group_size": 128, "form": "symmetric", "scale_dtype": "bfloat16",
                                 "layers": model["packed_layers"]}]
    assert model["packed_bytes"] == model["packed_weights"] // 4 + model["packed_weights"] // 64
    file = repository / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    packed = {name.removesuffix("scales") for name in tensors if name.endswith(".scales")}
    dense = [tensor for name, tensor in tensors.items() if f"{name.rpartition('.')[0]}." not in packed]
    assert model["dense_tensors"] == len(dense) and model["dense_bytes"] == sum(tensor.nbytes for tensor in dense)
    assert model["file_bytes"] == file.stat().st_size
    assert model["config"]["joint_attention_dim"] == 384 and parts["VAE"]["config"]["latent_channels"]
    assert run("inspect", repository) == 0
    lines = (f"  {model['packed_weights']:,} packed weights in {model['packed_bytes']:,} bytes; {len(dense)} dense "
             f"tensors in {model['dense_bytes']:,} bytes (bfloat16)\n  {model['file_bytes']:,} bytes on disk\n"
             "  problem: none\n")
    assert lines in capsys.readouterr().out
    assert run("inspect", repository / "vae") == 0
    assert "VAE, diffusers format" in capsys.readouterr().out


def test_inspect_shows_warnings_and_counts_all_shards(copy, capsys):
    folder = copy("sharded")
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["gone.weight"] = "a.safetensors"
    index.write_text(json.dumps(content))
    assert run("inspect", folder) == 0
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    printed = capsys.readouterr().out
    assert f"  {size:,} bytes on disk\n  warning: the index and a.safetensors differ in 1 tensors, such as " in printed


def test_inspect_names_what_it_cannot_describe(repository, tmp_path, capsys):
    whole = shutil.copytree(repository, tmp_path / "whole")
    (whole / "mine").mkdir()
    (whole / "mine" / "a.safetensors").write_bytes(b"cut short")
    assert run("inspect", whole) == 0
    assert f"{whole / 'mine' / 'a.safetensors'}\n  other folder\n  problem: " in capsys.readouterr().out
    for tensors, said in (({"x": torch.zeros(1)}, "tensors such as x"), ({}, "no tensors")):
        save_file(tensors, tmp_path / "other.safetensors")
        assert run("inspect", tmp_path / "other.safetensors") == 2
        assert f"expected the diffusion model of Bonsai Image, found {said};" in sentence(capsys)


def test_inspect_finds_a_code_that_is_not_ternary(repository, tmp_path, capsys):
    assert run("convert", repository, tmp_path / "a.safetensors", "--to", "comfy") == 0
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["single_blocks.0.linear1.weight"][0, 0] |= 3
    save_file(tensors, tmp_path / "b.safetensors")
    capsys.readouterr()
    assert run("inspect", tmp_path / "b.safetensors") == 0
    printed = capsys.readouterr()
    assert "comfy format, ternary" in printed.out and "problem: none" in printed.out, "no code is read without --verify"
    assert not printed.err, "and no file hashed"
    assert run("inspect", tmp_path / "b.safetensors", "--verify") == 0
    printed = capsys.readouterr()
    assert "not ternary (first: single_blocks.0.linear1.weight)" in printed.out
    assert "comfy format, 2-bit symmetric" in printed.out and "hashing b.safetensors" in printed.err
    assert run("convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "comfy") == 0
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "Bonsai Image 4B 2-bit symmetric"


def test_output_that_cannot_show_a_name_does_not_fail(repository, tmp_path):
    """Run as a module, into a Windows code page."""
    target = tmp_path / "日本.safetensors"
    done = subprocess.run([sys.executable, "-m", "bonsai_image", "convert", str(repository), str(target), "--to",
                           "comfy"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and target.exists() and rb"\u65e5" in done.stdout


def test_streams_that_stand_in_for_stdout_and_stderr_are_enough(monkeypatch):
    """``%run __main__.py`` in Jupyter, whose streams have no ``reconfigure``."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr(sys, "argv", ["bonsai-image", "inspect", str(BINARY)])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setitem(sys.modules, "bonsai_image", sys.modules["bonsai_image"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(MINIATURE.parent / "__main__.py"), run_name="__main__")
    assert "binary" in sys.stdout.getvalue()


def test_generate_decodes_with_another_vae(tmp_path):
    """One that makes every image white."""
    own = load_file(MINIATURE / "ternary" / "vae" / "diffusion_pytorch_model.safetensors")
    own["decoder.conv_out.bias"] += 100
    vae = shutil.copytree(MINIATURE / "ternary" / "vae", tmp_path / "vae")
    save_file(own, vae / "diffusion_pytorch_model.safetensors")
    words = ["generate", "--checkpoint", str(MINIATURE / "ternary"), "--prompt", "a red bonsai", "--width", "64",
             "--height", "64", "--steps", "1", "--json", "--out", str(tmp_path / "white.png"), "--vae"]
    assert cli.main([*words, str(vae)]) == 0
    assert Image.open(tmp_path / "white.png").getextrema() == ((255, 255),) * 3
    assert cli.main([*words, str(tmp_path / "gone")]) == 2
