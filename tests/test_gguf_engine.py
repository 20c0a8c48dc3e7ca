"""stable-diffusion.cpp as the reference: the files written here, run by the engine that they are written for, give the
latent that diffusers computes from the published weights."""

import itertools

import pytest
import torch
from diffusers import Flux2KleinPipeline

from bonsai_image.loaders import gguf, load_transformer, save_transformer
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.tests.support import model_files
from bonsai_image.tests.support.engine import BUILD, FOLDER, Engine

pytestmark = pytest.mark.skipif(not FOLDER, reason=BUILD)

#: What stable-diffusion.cpp takes for FLUX.2 Klein: 128 channels, heads of 128.
CHANNELS, TEXT_WIDTH, TOKENS, SIDE = 128, 384, 16, 8
SIGMAS = (1.0, 0.9, 0.75, 0.45, 0.0)
#: Relative differences of the denoised part of the latent. In FP32 the two engines differ by rounding alone; on packed
#: weights ggml rounds the activations to int8, 32 to a scale.
FP32_ERROR, INT8_ERROR = 2e-6, 5e-3


def denoise(model, noise: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """What four Euler steps add to the noise."""
    latent = noise
    for sigma, after in itertools.pairwise(SIGMAS):
        latent = latent + (after - sigma) * model(latent, context, sigma)
    return latent - noise


def diffusers_model(transformer):
    """A diffusers transformer, called like :class:`Engine`."""
    def call(x: torch.Tensor, context: torch.Tensor, time: float) -> torch.Tensor:
        ids = Flux2KleinPipeline._prepare_latent_ids(x[None])
        out = transformer(x.flatten(1).t()[None], context[None], torch.tensor([time]), ids,
                          Flux2KleinPipeline._prepare_text_ids(context[None]), return_dict=False)[0]
        return out[0].t().reshape(x.shape)
    return call


@pytest.mark.parametrize("bits", [1, 2], ids=["Q1_0", "Q2_0"])
def test_same_latent(bits, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "SMALL", {**model_files.SMALL, "in_channels": CHANNELS, "out_channels": CHANNELS,
                                         "joint_attention_dim": TEXT_WIDTH})
    model = model_files.dense_model(bits)
    unpacked = model_files.write_diffusers(model, tmp_path / "unpacked")
    save_transformer(load_transformer(unpacked), tmp_path / "packed.gguf", "gguf")
    dense = {name.replace("_norm.weight", "_norm.scale"): tensor.float()
             for name, tensor in to_comfyui(dict(model.state_dict())).items()}
    entries = gguf.layout({name: (gguf.F32, tuple(tensor.shape)) for name, tensor in dense.items()})
    gguf.write(tmp_path / "fp32.gguf", entries, dense.values(), {})

    generator = torch.Generator().manual_seed(bits)
    noise = torch.randn(CHANNELS, SIDE, SIDE, generator=generator)
    context = torch.randn(TOKENS, TEXT_WIDTH, generator=generator)
    expected = denoise(diffusers_model(model.float()), noise, context)
    for name, limit in (("fp32", FP32_ERROR), ("packed", INT8_ERROR)):
        engine = Engine(tmp_path / f"{name}.gguf")
        error = float((denoise(engine, noise, context) - expected).norm() / expected.norm())
        engine.close()
        assert error < limit, f"{name}: {error:.1e}"
