"""What a device is, and the dtype to compute in on it."""

import functools
import platform
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

#: Names that users choose from. The kernels of Triton and MLX compute in all of these.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AMPERE = (8, 0)


class Gpu(NamedTuple):
    """A GPU: ``vendor`` is nvidia, amd or intel; ``capability`` is NVIDIA's, (0, 0) elsewhere."""

    vendor: str
    name: str
    capability: tuple[int, int] = (0, 0)

    @property
    def architecture(self) -> str:
        """NVIDIA's name for the capability."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU that a ``cuda`` or ``xpu`` device is. Initialises the device."""
    if device.type == "xpu":
        return Gpu("intel", torch.xpu.get_device_name(device))
    name = torch.cuda.get_device_name(device)
    return Gpu("amd", name) if torch.version.hip else Gpu("nvidia", name, torch.cuda.get_device_capability(device))


def current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current device, on which Triton launches its kernels."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).device(device)
    return nullcontext()


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if device.type == "cpu" and info.exists() else ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def default_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the device multiplies it fast, else FP16 on CUDA GPUs before Ampere, else FP32.

    On a CPU never FP16: with AVX512-BF16 it measured 14 times slower than BF16.
    """
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.bfloat16
    with current(device):  # of which torch answers
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies BF16 matrices in hardware (x86 with AVX512-BF16 or AMX).

    With AVX512-BF16, BF16 measured 4 times as fast as FP32, and FP16 3 times slower than FP32. Older releases of
    torch cannot tell (``get_capabilities`` is missing); then the answer is no.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
