"""The compute dtype that suits a device."""

from __future__ import annotations

import torch

from .torch_backend import cpu_has_fast_bfloat16

#: Names that users choose from.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the device multiplies it fast, else FP16 on CUDA cards before Ampere, else FP32.

    On a CPU never FP16: with AVX512-BF16 it measured 14 times slower than BF16.
    """
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
