"""LoRA files of every naming and kind: what they mean, against a definition in float64; files of other models."""

import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import load_lora, load_transformer, save_lora
from bonsai_image.loaders.klein import comfyui_shapes
from bonsai_image.loaders.names import to_comfyui, to_diffusers
from bonsai_image.ops.packed import is_packed
from bonsai_image.ops.side_paths import changed
from bonsai_image.standalone import lora as standalone
from bonsai_image.standalone import models
from bonsai_image.tests.support import loras, random_model
from bonsai_image.tests.support.adapters import Maker
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
