"""The dtype to compute in on each kind of device."""

from __future__ import annotations

import pytest
import torch

from bonsai_image.ops import devices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32),
    ({"avx512_bf16": False, "amx_bf16": False}, torch.float32)], ids=str)
def test_cpu_computes_in_bf16_only_with_hardware_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.default_dtype(CPU) == expected


def test_cpu_computes_in_fp32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices.default_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_computes_in_fp16_only_before_ampere(monkeypatch, supported, expected):
    """Older GPUs only emulate BF16, which does not count."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or supported)
    assert devices.default_dtype(CUDA) == expected


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_compute_in_bf16(kind):
    assert devices.default_dtype(torch.device(kind)) == torch.bfloat16
