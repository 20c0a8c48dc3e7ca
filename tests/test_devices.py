"""What is known of each kind of device, and the dtype to compute in on it."""

from contextlib import contextmanager

import pytest
import torch

from bonsai_image.ops import devices
from bonsai_image.ops.devices import Gpu, gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32),
    ({"avx512_bf16": False, "amx_bf16": False}, torch.float32)], ids=str)
def test_cpu_computes_in_bf16_only_with_hardware_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.default_dtype(CPU) == expected


def test_cpu_computes_in_fp32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices.default_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("index", "expected"), [(1, torch.bfloat16), (2, torch.float16)])
def test_cuda_computes_in_fp16_only_before_ampere(monkeypatch, index, expected):
    """Older GPUs only emulate BF16, which does not count. Torch answers for the current GPU."""
    made = [0]

    @contextmanager
    def device(here):
        made.append(here.index)
        yield
        made.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or made[-1] == 1)
    assert devices.default_dtype(torch.device("cuda", index)) == expected


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_compute_in_bf16(kind):
    assert devices.default_dtype(torch.device(kind)) == torch.bfloat16


@pytest.mark.parametrize(("kind", "hip", "expected"), [
    ("cuda", None, Gpu("nvidia", "a GPU", (8, 9))), ("cuda", "6.4", Gpu("amd", "a GPU")),
    ("xpu", None, Gpu("intel", "a GPU"))])
def test_vendor_name_and_capability(monkeypatch, kind, hip, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    gpu.cache_clear()
    assert gpu(torch.device(kind, 0)) == expected
    gpu.cache_clear()
    assert Gpu("nvidia", "x", (12, 0)).architecture == "sm_120"


def test_current_makes_a_gpu_current_and_leaves_others(monkeypatch):
    made = []

    class Current:
        def __init__(self, device):
            made.append(device)

        def __enter__(self):
            made.append("in")

        def __exit__(self, *_):
            made.append("out")

    monkeypatch.setattr(torch.cuda, "device", Current)
    for name in ("cuda:1", "cpu", "mps"):
        with devices.current(torch.device(name)):
            made.append(name)
    assert made == [torch.device("cuda:1"), "in", "cuda:1", "out", "cpu", "mps"]
