"""stable-diffusion.cpp as the reference: the files written here, run by the engine that they are written for, give the
latent that diffusers computes from the published weights."""

import ctypes
import itertools
import os
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline

from bonsai_image.loaders import gguf, load_transformer, save_transformer
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.tests.support import model_files

_SDCPP = os.environ.get("BONSAI_SDCPP")
pytestmark = pytest.mark.skipif(not _SDCPP, reason="build stable-diffusion.cpp with tests/lab/stable_diffusion.sh and "
                                "set BONSAI_SDCPP to its folder")

_FLOATS = ctypes.POINTER(ctypes.c_float)
#: What stable-diffusion.cpp takes for FLUX.2 Klein: 128 channels, heads of 128.
CHANNELS, TEXT_WIDTH, TOKENS, SIDE = 128, 384, 16, 8
SIGMAS = (1.0, 0.9, 0.75, 0.45, 0.0)
#: Relative differences of the denoised part of the latent. In FP32 the two engines differ by rounding alone; on packed
#: weights ggml rounds the activations to int8, 32 to a scale.
FP32_ERROR, INT8_ERROR = 2e-6, 5e-3


class Engine:
    """One file loaded by stable-diffusion.cpp."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(Path(_SDCPP) / "libflux.so"))
        self.library.load.restype = ctypes.c_void_p
        self.library.unload.argtypes = [ctypes.c_void_p]
        self.library.forward.restype = ctypes.c_bool
        self.library.forward.argtypes = [ctypes.c_void_p, ctypes.c_int, _FLOATS, *[ctypes.c_int64] * 3, _FLOATS,
                                         *[ctypes.c_int64] * 2, ctypes.c_float, _FLOATS]
        self.model = self.library.load(str(path).encode())
        assert self.model, "stable-diffusion.cpp does not load the file"

    def __call__(self, x: torch.Tensor, context: torch.Tensor, time: float) -> torch.Tensor:
        x, context, out = x.contiguous(), context.contiguous(), torch.empty(x.shape)
        data = [ctypes.cast(tensor.data_ptr(), _FLOATS) for tensor in (x, context, out)]
        assert self.library.forward(self.model, 1, data[0], *x.shape, data[1], *context.shape, time, data[2])
        return out

    def close(self) -> None:
        self.library.unload(self.model)


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
