"""ComfyUI's options for dtypes mean what they say, for each model by itself, and a node's own input comes first."""

import comfy.model_management
import pytest
import torch
from comfy.cli_args import args as host_args
from comfy_extras.nodes_model_advanced import ModelComputeDtype

from bonsai_image.nodes import models
from bonsai_image.nodes.operations import HostLinear

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: Option -> what diffusion model, text encoder and VAE compute in on a CPU with fast BF16.
OPTIONS = {
    None: (BF16, BF16, FP32), "force_fp32": (FP32, FP32, FP32), "fp32_unet": (FP32, BF16, FP32),
    "fp64_unet": (FP64, BF16, FP32), "bf16_unet": (BF16, BF16, FP32), "fp16_unet": (FP16, BF16, FP32),
    "fp8_e4m3fn_unet": (BF16, BF16, FP32), "fp8_e5m2_unet": (BF16, BF16, FP32),
    "fp32_text_enc": (BF16, FP32, FP32), "fp16_text_enc": (BF16, FP32, FP32), "bf16_text_enc": (BF16, BF16, FP32),
    "fp8_e4m3fn_text_enc": (BF16, BF16, FP32), "fp8_e5m2_text_enc": (BF16, BF16, FP32),
    "fp32_vae": (BF16, BF16, FP32), "bf16_vae": (BF16, BF16, BF16), "fp16_vae": (BF16, BF16, FP16),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_command_line(repository, monkeypatch, option, fast):
    monkeypatch.setattr(models, "default_dtype", lambda device: BF16 if fast else FP32)
    if option:
        monkeypatch.setattr(host_args, option, True)
    cpu, (diffusion, text, vae) = torch.device("cpu"), OPTIONS[option]
    if not fast:  # only who asks for BF16 gets it
        diffusion = FP32 if diffusion == BF16 and option != "bf16_unet" else diffusion
        text = FP32
    assert models.dtype_to_impose("diffusion model", "auto", cpu) == diffusion
    assert models.dtype_to_impose("text encoder", "auto", cpu) == text
    assert comfy.model_management.vae_dtype(cpu, [BF16, FP32]) == vae
    for part in ("diffusion model", "text encoder"):
        assert models.dtype_to_impose(part, "fp16", cpu) == FP16


@pytest.mark.parametrize("option", [None, "force_fp32", "fp32_unet", "fp32_text_enc", "bf16_vae"])
def test_the_models_follow(repository, monkeypatch, option):
    monkeypatch.setattr(models, "default_dtype", lambda device: BF16)
    if option:
        monkeypatch.setattr(host_args, option, True)
    diffusion, text, vae = OPTIONS[option]
    model = models.load_model(str(repository / "transformer-packed-mflux"))
    assert f"compute dtype: {str(diffusion).removeprefix('torch.')}\n" in models.describe(model)
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"))
    assert {layer.compute_dtype for layer in clip.cond_stage_model.modules() if isinstance(layer, HostLinear)} == {text}
    assert models.load_vae_model(str(repository / "vae")).vae_dtype == vae


@pytest.mark.parametrize("option", [None, "fp32_unet", "fp32_text_enc", "force_fp32"])
def test_elsewhere_than_on_a_cpu_comfyui_decides(monkeypatch, option):
    if option:
        monkeypatch.setattr(host_args, option, True)
    for part in ("diffusion model", "text encoder"):
        assert models.dtype_to_impose(part, "auto", torch.device("cuda")) is None
        assert models.dtype_to_impose(part, "fp16", torch.device("cuda")) == FP16


def test_the_vae_stays_on_the_cpu(repository, monkeypatch):
    monkeypatch.setattr(host_args, "cpu_vae", True)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("meta"))
    assert models.load_vae_model(str(repository / "vae")).device == torch.device("cpu")


@pytest.mark.parametrize(("dtype", "said"), [("fp16", "float16"), ("bf16", "bfloat16"), ("default", "float32")])
def test_info_shows_what_computes_now(repository, dtype, said):
    model = models.load_model(str(repository / "transformer-packed-mflux"), "bf16")
    changed = ModelComputeDtype().patch(model, dtype)[0]
    assert f"compute dtype: {said}\n" in models.describe(changed)
    assert "compute dtype: bfloat16\n" in models.describe(model)
