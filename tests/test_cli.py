"""The command line, end to end on a miniature pack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_model import write_repository
from safetensors.torch import load_file, save_file

from bonsai_image.ops.devices import cpu_has_fast_bfloat16
from bonsai_image.standalone import cli
from bonsai_image.standalone.cli import main


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("cli") / "bonsai-mini")


#: The binary diffusion model of the trained miniature.
BINARY = Path(__file__).parent.parent / "miniature" / "binary.safetensors"


def run(*argv) -> int:
    return main([str(word) for word in argv])


def test_demo_draws_a_contact_sheet(tmp_path, capsys):
    out = tmp_path / "new" / "demo.png"
    assert run("demo", "--out", out, "--device", "cpu") == 0
    image = Image.open(out)
    assert json.loads(image.text["bonsai"]).keys() == {"dense", "ternary", "binary"}
    # Prompt 3, a red star on black, in the second row, that of the ternary model.
    left, top = 118 + 2 * 136, 8 + 136
    assert image.getpixel((left + 4, top + 4)) < (60, 60, 60) and image.getpixel((left + 64, top + 99))[0] > 150
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("dense", "ternary", "binary", "denoise", "MB", "weights:"))


def test_demo_without_the_miniature_is_one_sentence(tmp_path, capsys, monkeypatch):
    from bonsai_image.standalone import demo

    monkeypatch.setattr(demo, "MINIATURE", tmp_path / "none")
    assert run("demo", "--out", tmp_path / "demo.png") == 2
    assert "clone the repository" in capsys.readouterr().err and not (tmp_path / "demo.png").exists()


def test_pytorch_for_cuda_without_a_card_draws_on_the_cpu(monkeypatch):
    """Such a PyTorch names CUDA, unless it is asked to check."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: None if check_available else torch.device("cuda"))
    assert cli._device(None) == torch.device("cpu")


def test_what_draws_nothing_does_without_diffusers(pack, tmp_path):
    """As in a Python that runs ComfyUI, which brings none."""
    code = "import sys; sys.modules['diffusers'] = None; from bonsai_image.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "inspect", pack], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", code, "generate", "--checkpoint", pack, "--prompt", "x"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"bonsai-image: {sys.executable} has no diffusers")
    assert len(done.stderr.strip().splitlines()) == 1


def test_generate_is_reproducible_and_carries_its_settings(pack, tmp_path, capsys):
    images = []
    for i, seed in enumerate((7, 7, 8)):
        out = tmp_path / f"{i}.png"
        assert run("generate", "--checkpoint", pack, "--prompt", "ein Bäumchen", "--width", 64, "--height", 64,
                   "--seed", seed, "--dtype", "fp32", "--device", "cpu", "--out", out, "--json") == 0
        images.append(Image.open(out))
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()
    settings = json.loads(images[0].text["bonsai"])
    assert settings["prompt"] == "ein Bäumchen" and settings["seed"] == 7 and settings["variant"] == "ternary"
    report = json.loads(capsys.readouterr().out.splitlines()[0])
    assert report["stages"].keys() == {"load text encoder", "encode prompt", "load diffusion model", "load VAE",
                                       "denoise", "decode image"}
    assert all(stage["seconds"] > 0 and stage["megabytes"] > 0 for stage in report["stages"].values())


def test_prompt_reaches_the_picture(pack, tmp_path):
    for name in ("a", "b"):
        run("generate", "--checkpoint", pack, "--prompt", name, "--width", 64, "--height", 64, "--device", "cpu",
            "--out", tmp_path / f"{name}.png", "--json")
    assert Image.open(tmp_path / "a.png").tobytes() != Image.open(tmp_path / "b.png").tobytes()


@pytest.mark.parametrize("words", [("--image", "reference.png"), ("--transformer", BINARY), ("--steps", 2)],
                         ids=["image", "transformer", "steps"])
def test_every_option_reaches_the_picture(tmp_path, words):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "reference.png")
    words = [tmp_path / word if word == "reference.png" else word for word in words]
    pictures = []
    for name, more in (("a", ()), ("b", words)):
        assert run("generate", "--checkpoint", BINARY.parent / "ternary", "--prompt", "two green circles",
                   "--width", 64, "--height", 64, "--device", "cpu",
                   "--out", tmp_path / f"{name}.png", "--json", *more) == 0
        pictures.append(Image.open(tmp_path / f"{name}.png"))
    assert pictures[0].tobytes() != pictures[1].tobytes()
    variant = "binary" if BINARY in words else "ternary"
    assert json.loads(pictures[1].text["bonsai"])["variant"] == variant


def test_backend_and_precision_reach_the_setting():
    args = cli._parser().parse_args(["demo", "--backend", "triton", "--precision", "fast"])
    assert cli._run_on(args)[2] == ("triton", "fast")


def test_demo_takes_steps_and_seed(tmp_path):
    assert run("demo", "--out", tmp_path / "a.png", "--device", "cpu", "--steps", 2, "--seed", 5, "--json") == 0
    settings = json.loads(Image.open(tmp_path / "a.png").text["bonsai"])
    assert {(one["steps"], one["seed"], one["source"]) for one in settings.values()} == {
        (2, 5, "dense"), (2, 5, "ternary"), (2, 5, "miniature/train")}


def test_inspect_describes_a_repository(pack, capsys):
    assert run("inspect", pack, "--json") == 0
    parts = {part["kind"]: part for part in json.loads(capsys.readouterr().out)}
    assert parts.keys() == {"diffusion model", "text encoder", "VAE"}
    model = parts["diffusion model"]
    assert (model["variant"], model["format"], model["problems"]) == ("ternary", "mlx", [])
    assert model["packing"] == [{"bits": 2, "group_size": 128, "form": "symmetric", "scale_dtype": "bfloat16",
                                 "layers": model["packed_layers"]}]
    assert model["packed_bytes"] == model["packed_weights"] // 4 + model["packed_weights"] // 64
    file = pack / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    packed = {name.removesuffix("scales") for name in tensors if name.endswith(".scales")}
    dense = [tensor for name, tensor in tensors.items() if f"{name.rpartition('.')[0]}." not in packed]
    assert model["dense_tensors"] == len(dense) and model["dense_bytes"] == sum(tensor.nbytes for tensor in dense)
    assert model["file_bytes"] == file.stat().st_size
    assert run("inspect", pack / "vae") == 0
    assert "VAE" in capsys.readouterr().out


def test_inspect_finds_a_code_that_is_not_ternary(pack, tmp_path, capsys):
    assert run("convert", pack, tmp_path / "a.safetensors", "--to", "comfy") == 0
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["single_blocks.0.linear1.weight"][0, 0] |= 3
    save_file(tensors, tmp_path / "b.safetensors")
    assert run("inspect", tmp_path / "b.safetensors") == 0
    assert "not ternary (first: single_blocks.0.linear1.weight)" in capsys.readouterr().out


def test_convert_never_touches_an_existing_file_and_leaves_nothing_behind(pack, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"precious")
    assert run("convert", pack, target, "--to", "comfy") == 2
    assert target.read_bytes() == b"precious" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert "existing" in capsys.readouterr().err
    assert run("convert", BINARY, tmp_path / "b.safetensors", "--to", "comfy-base3") == 2
    assert "base 3 stores ternary weights, not 1-bit symmetric ones; choose another format." in capsys.readouterr().err
    assert run("convert", pack, tmp_path / "b", "--to", "comfy") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_written_files_have_ordinary_permissions(pack, tmp_path):
    (tmp_path / "ordinary").touch()
    assert run("convert", pack, tmp_path / "a.safetensors", "--to", "comfy") == 0
    assert run("convert", pack, tmp_path / "probe", "--to", "mlx") == 0
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "a.safetensors", *(tmp_path / "probe").iterdir())} == {expected}


def test_a_failed_write_leaves_nothing(pack, tmp_path, monkeypatch):
    from bonsai_image.loaders import ModelFileError, load_transformer, save_transformer
    from bonsai_image.loaders.formats import comfy

    def spoil(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(comfy, "save_file", spoil)
    with pytest.raises(ModelFileError, match="no space left"):
        save_transformer(load_transformer(pack / "transformer-packed-mflux"), tmp_path / "a.safetensors", "comfy")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_verified(pack, tmp_path, monkeypatch):
    from bonsai_image.loaders import ModelFileError, load_transformer, save_transformer
    from bonsai_image.loaders.formats import comfy

    original = comfy.save_file

    def flip(tensors, path, metadata):
        original(tensors, path, metadata)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(comfy, "save_file", flip)
    with pytest.raises(ModelFileError, match="difference after writing"):
        save_transformer(load_transformer(pack / "transformer-packed-mflux"), tmp_path / "a.safetensors", "comfy")
    assert list(tmp_path.iterdir()) == []


def test_runs_as_a_module(pack):
    done = subprocess.run([sys.executable, "-m", "bonsai_image", "inspect", str(pack)], capture_output=True, text=True)
    assert done.returncode == 0 and "diffusion model, mlx format, ternary" in done.stdout


def test_default_dtype_on_a_cpu_is_never_half():
    from bonsai_image.ops.devices import default_dtype

    expected = torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32
    assert default_dtype(torch.device("cpu")) == expected
