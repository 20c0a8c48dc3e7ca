"""The one place that chooses which backend multiplies a packed weight.

A backend is a module with ``linear(x, weight, bias)`` and a line in :data:`BACKENDS`.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import mlx_backend, torch_backend

#: Name -> module. ``auto`` is no backend but the choice among them.
BACKENDS = {"torch": torch_backend, "mlx": mlx_backend}

NAMES = ("auto", *BACKENDS)


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that serves ``backend`` (a name in :data:`NAMES`) on ``device``."""
    if backend == "mlx" or (backend == "auto" and mlx_backend.is_apple_silicon(device)):
        return "mlx" if mlx_backend.available() else "torch"
    return "torch" if backend == "auto" else backend


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend: str = "auto") -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``(..., K)`` and a packed ``weight`` ``(N, K)``, in the dtype of ``x``."""
    return BACKENDS[resolve(backend, x.device)].linear(x, weight, bias)
