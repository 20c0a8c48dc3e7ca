"""LoRA files of every naming and kind: what they mean, against a definition in float64; files of other models."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bonsai_image.loaders import load_lora, load_transformer, save_lora
from bonsai_image.loaders.klein import KleinConfig, comfyui_shapes
from bonsai_image.loaders.names import to_comfyui, to_diffusers
from bonsai_image.ops.packed import is_packed
from bonsai_image.ops.side_paths import Adapter, Patch, changed, side_paths
from bonsai_image.standalone import lora as standalone
from bonsai_image.standalone import models, options
from bonsai_image.tests.support import loras, random_model
from bonsai_image.tests.support.adapters import Maker
from bonsai_image.tests.support.command_line import MINIATURE, run, sentence
from bonsai_image.tests.support.reference import dense64, relative

SMALL = random_model._KLEIN
SHAPES = comfyui_shapes(SMALL)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    folder = random_model.write_repository(tmp_path_factory.mktemp("lora"), seed=3) / "transformer-packed-mflux"
    return load_transformer(folder)


@pytest.fixture(scope="module")
def weights(transformer):
    """By ComfyUI's names, dense."""
    return {name: dense64(t) if is_packed(t) else t.double() for name, t in to_comfyui(transformer.tensors).items()}


def read(path, naming, kind, **metadata):
    adapters = loras.content(naming, kind, SHAPES, Maker(seed=5))
    save_file({name: t.contiguous() for name, t in loras.written(naming, adapters).items()}, path, metadata or None)
    return load_lora(path), adapters


@pytest.mark.parametrize("kind", loras.KINDS)
@pytest.mark.parametrize("naming", loras.NAMINGS)
def test_every_naming_of_every_kind(naming, kind, weights, tmp_path):
    found, adapters = read(tmp_path / "lora.safetensors", loras.NAMINGS[naming], kind)
    assert not found.unknown and not found.text_encoder and len(found.groups) == len(adapters)
    expected = loras.merged(loras.NAMINGS[naming], adapters, weights, 0.7)
    for lossless in (False, True):
        if lossless:
            save_lora(found, tmp_path / "comfy.safetensors")
            found = load_lora(tmp_path / "comfy.safetensors")
            assert found.ignored == 0
        patches = found.fitting(SHAPES, 0.7)
        assert patches.keys() == expected.keys()
        for layer, weight in expected.items():
            assert relative(changed(patches[layer], weights[f"{layer}.weight"].float()), weight) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*loras.KINDS, "dora_on_the_input_axis"])
@pytest.mark.parametrize("naming", ["ai-toolkit", "diffusers, all layers"])
def test_beside_the_packed_layers_of_diffusers_transformer(transformer, weights, naming, kind, tmp_path):
    """The result of diffusers' transformer is that of one with the LoRA merged into dense weights."""
    naming = loras.NAMINGS[naming]
    found, adapters = read(tmp_path / "lora.safetensors", naming, kind)
    cpu = torch.device("cpu")
    packed = models.transformer_module(transformer, cpu, torch.float32)
    merged = weights | {f"{layer}.weight": weight for layer, weight in
                        loras.merged(naming, adapters, weights, 0.5).items()}
    dense = _dense(transformer, merged)
    inputs = _inputs(SMALL)
    plain, expected = packed(**inputs)[0], dense(**inputs)[0]
    with standalone.applied(standalone.hooks(packed, [(found, 0.5)])):
        actual = packed(**inputs)[0]
    assert relative(expected, plain) > 1e-3
    assert relative(actual, expected) < 1e-4
    assert torch.equal(packed(**inputs)[0], plain)


def _dense(transformer, tensors):
    from diffusers import Flux2Transformer2DModel

    module = Flux2Transformer2DModel(**transformer.config.diffusers()).eval()
    module.load_state_dict({name: t.float() for name, t in to_diffusers(tensors).items()})
    return module


def _inputs(config):
    generator = torch.Generator().manual_seed(1)

    def ids(n, axis):
        result = torch.zeros(n, 4)
        result[:, axis] = torch.arange(n)
        return result

    return {"hidden_states": torch.randn(1, 16, config.in_channels, generator=generator),
            "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=generator),
            "timestep": torch.tensor([0.6]), "img_ids": ids(16, 1), "txt_ids": ids(8, 3), "return_dict": False}


@pytest.mark.parametrize(("said", "scale"), [
    ({}, 1.0), ({"lora_alpha": 2}, 0.5), ({"lora_alpha": float("nan")}, 1.0),
    ({"lora_alpha": 2, "use_rslora": True}, 1.0),
    ({"lora_alpha": 2, "alpha_pattern": {"attn.to_q": 12}}, 3.0)], ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["in the metadata", "in adapter_config.json"])
def test_alpha_where_the_file_has_none(said, scale, beside, tmp_path):
    path = tmp_path / "adapter_model.safetensors" if beside else tmp_path / "lora.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})}
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(4, 256), f"{layer}.lora_B.weight": torch.ones(256, 4)}, path,
              None if beside else metadata)
    ((patch,),) = load_lora(path).fitting(SHAPES).values()
    assert patch.adapter.scale == scale and patch.place == (0, 256)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16,
                                   torch.float64], ids=str)
def test_factors_of_every_dtype(dtype, weights, tmp_path):
    naming = loras.NAMINGS["diffusers, SimpleTuner"]
    adapters = {layer: {name: t.to(dtype) for name, t in tensors.items()}
                for layer, tensors in loras.content(naming, "dora", SHAPES, Maker(seed=5)).items()}
    save_file(loras.written(naming, adapters), tmp_path / "lora.safetensors")
    patches = load_lora(tmp_path / "lora.safetensors").fitting(SHAPES)
    for layer, weight in loras.merged(naming, adapters, weights).items():
        assert relative(changed(patches[layer], weights[f"{layer}.weight"].float()), weight) < 1e-5


def layers(config, rank=1, names=("lora_A.weight", "lora_B.weight")) -> dict[str, torch.Tensor]:
    """A LoRA on all matrices of a model, in ComfyUI's naming."""
    return {f"diffusion_model.{name.removesuffix('.weight')}.{names[side]}": torch.ones(
        (rank, shape[1]) if side == 0 else (shape[0], rank), dtype=torch.bfloat16)
            for name, shape in comfyui_shapes(config).items() if len(shape) == 2 for side in (0, 1)}


def test_an_untrained_lora_is_no_unfinished_download(tmp_path):
    """Its factors of zeros lie one after the other where they have a dtype of their own."""
    tensors = {name: torch.zeros_like(tensor, dtype=torch.float32) if "lora_B" in name else tensor
               for name, tensor in layers(SMALL).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert len(load_lora(tmp_path / "lora.safetensors").groups) == len(tensors) // 2


FLUX1 = {f"lora_unet_double_blocks_{i}_{layer}.{side}.weight": torch.ones(shape)
         for i in range(19) for layer, (n, k) in {"img_attn_qkv": (9216, 3072), "img_mod_lin": (18432, 3072),
                                                  "img_mlp_0": (12288, 3072)}.items()
         for side, shape in (("lora_up", (n, 1)), ("lora_down", (1, k)))}


@pytest.mark.parametrize(("tensors", "made_for", "fit"), [
    (layers(KleinConfig()), "FLUX.2 Klein 4B", 89), (layers(KleinConfig(32, 12288, 128, 128, 8, 24)), "FLUX.2 Klein 9B",
                                                     0),
    (FLUX1, "FLUX.1", 5), ({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(8, 1),
                            "lora_unet_down_blocks_0.lora_down.weight": torch.ones(1, 8)}, "another model", 0)],
    ids=["4B", "9B", "FLUX.1", "SDXL"])
def test_inspect_says_what_a_lora_was_made_for(tensors, made_for, fit, tmp_path, capsys):
    save_file(tensors, tmp_path / "lora.safetensors")
    assert run("inspect", tmp_path / "lora.safetensors", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["made_for"], found["layers_that_fit_4B"]) == (made_for, fit)
    assert run("inspect", tmp_path / "lora.safetensors") == 0
    assert f"made for {made_for}" in capsys.readouterr().out


ODD = {"diffusion_model.img_in.lora_mid.weight": "known layer or kind", "transformer.nothing.lora_A.weight": "no known",
       "lora_te_layers_0.lora_down.weight": "text encoder", "text_encoder.x.lora_A.weight": "text encoder",
       "diffusion_model.img_in.lora_A.scale_weight": "known layer", "diffusion_model.img_in.diff_b": "known layer",
       "lora_unet_img_in.lora_down.weight": "known layer"}


@pytest.mark.parametrize(("name", "words"), ODD.items(), ids=str)
def test_what_is_not_understood_is_named_and_kept(name, words, tmp_path):
    tensors = layers(SMALL) | {name: torch.ones(2, 128)}
    save_file(tensors, tmp_path / "lora.safetensors", {"trainer": "x"})
    found = load_lora(tmp_path / "lora.safetensors")
    (said,) = found.without_effect(len(found.groups))
    assert words in said and (name in said or "img_in" in said)
    assert sum("img_in" in target.layer for target in found.groups) == ("img_in" not in name or "diff_b" in name
                                                                        or "unet" in name)
    save_lora(found, tmp_path / "comfy.safetensors")
    again = load_lora(tmp_path / "comfy.safetensors")
    assert name in again.unknown | again.text_encoder and again.metadata == {"trainer": "x"}


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "dora_scale"])
def test_a_number_in_the_place_of_a_matrix_is_named(part, tmp_path):
    name = f"diffusion_model.img_in.{part}"
    save_file(layers(SMALL) | {name: torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    assert name in load_lora(tmp_path / "lora.safetensors").unknown


@pytest.mark.parametrize("adapter", ["default", "my-lora", "0"])
def test_an_adapter_may_have_any_name(adapter, tmp_path):
    save_file({name.replace(".weight", f".{adapter}.weight"): tensor for name, tensor in layers(SMALL).items()},
              tmp_path / "lora.safetensors")
    assert not load_lora(tmp_path / "lora.safetensors").unknown


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: {name: each for name, each in t.items() if "lora" not in name} | {"a": torch.ones(1)}, "a LoRA"),
    (lambda t: t | {min(t): torch.full_like(t[min(t)], torch.nan)}, "finite"),
    (lambda t: {f"{name}": each[..., :1].contiguous() for name, each in t.items()}, "fits this model")],
    ids=["something else", "NaN", "of another model"])
def test_an_unusable_lora_is_one_sentence(change, words, tmp_path, capsys):
    save_file(change(layers(SMALL)), tmp_path / "lora.safetensors")
    assert run("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "a", "--lora",
               tmp_path / "lora.safetensors", "--width", 64, "--height", 64, "--steps", 1, "--json", "--out",
               tmp_path / "x.png") == 2
    assert words in sentence(capsys)


def test_generate_takes_loras_at_strengths(tmp_path, capsys):
    lora, images = MINIATURE / "blue_pot_lora.safetensors", []
    for words in ((), ("--lora", f"{lora}:0"), ("--lora", lora), ("--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5")):
        out = tmp_path / f"{len(images)}.png"
        assert run("generate", "--checkpoint", MINIATURE / "ternary", "--prompt", "a bonsai in a red pot", "--width",
                   64, "--height", 64, "--steps", 2, "--dtype", "fp32", "--json", "--out", out, *words) == 0
        images.append(np.asarray(Image.open(out), dtype=float))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["loras"] == [[lora.name, 0.5]] * 2
    assert np.array_equal(images[0], images[1]) and abs(images[2] - images[0]).max() > 20
    assert abs(images[3] - images[2]).max() <= 2


@pytest.mark.parametrize(("text", "expected"), [
    ("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5)),
    ("a:-2", ("a", -2.0)), (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
    (r"C:\loras\a.safetensors:1e-1", (r"C:\loras\a.safetensors", 0.1)),
    ("a:b.safetensors", ("a:b.safetensors", 1.0))])
def test_a_path_and_its_strength(text, expected):
    path, strength = options.lora_option(text)
    assert (str(path), strength) == expected


def test_a_file_whose_name_ends_like_a_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert options.lora_option("a:2") == (Path("a:2"), 1.0) and options.lora_option("a:2:3") == (Path("a:2"), 3.0)
    with pytest.raises(argparse.ArgumentTypeError):
        options.lora_option("a:nan")


def test_convert_writes_what_comfyui_reads(tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    assert run("convert", MINIATURE / "blue_pot_lora.safetensors", out, "--to", "comfy-lora") == 0
    assert run("inspect", out, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert not any("ComfyUI" in problem for problem in found["problems"])
    assert run("convert", MINIATURE / "blue_pot_lora.safetensors", out, "--to", "comfy-lora") == 2
    assert "a path that is free" in sentence(capsys)


def test_factors_can_be_trained():
    """Side paths keep the gradient of the factors, at every call."""
    up, down = torch.zeros(8, 2, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    (path,) = side_paths([Patch(Adapter("product", (up, down), scale=0.5))])
    x = torch.randn(3, 16)
    for _ in range(2):
        y = torch.nn.functional.linear(x, torch.ones(8, 16, requires_grad=True))
        path.add(x, y, torch.empty(0))
        up.grad = None
        y.sum().backward()
        assert torch.allclose(up.grad, 0.5 * (x @ down.detach().T).sum(0).expand(8, 2))
