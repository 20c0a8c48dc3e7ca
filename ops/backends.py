"""The one place that chooses which backend multiplies a packed weight.

A backend is a module with ``linear(x, weight, bias)`` and a line in :data:`BACKENDS`. On a GPU the choice goes on, by
shape, in ``ops/accelerator.py``.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import accelerator, torch_backend
from .mlx import backend as mlx_backend

#: Name -> module. ``auto`` is no backend but the choice among them.
BACKENDS = {"torch": torch_backend, "mlx": mlx_backend}

#: What users choose from. All of these are exact.
NAMES = ("auto", *BACKENDS, "triton", "gemlite")

#: ``exact``, or ``fast``: activations rounded to int8 where the device has a kernel for it.
PRECISIONS = ("exact", "fast")


def select(backend: str, precision: str) -> str:
    """The backend that means ``backend`` (a name in :data:`NAMES`) at ``precision`` (one in :data:`PRECISIONS`).

    Raises ValueError where they contradict each other.
    """
    if precision == "exact":
        return backend
    if backend not in ("auto", "triton"):
        raise ValueError(f"precision fast is computed by the triton backend; set backend to auto, not {backend}")
    return "int8"


def problem(backend: str) -> str | None:
    """Why what is installed here cannot serve ``backend`` (a name in :data:`NAMES`), in one sentence, or None."""
    if backend == "mlx":
        return mlx_backend.problem()
    return accelerator.problem(backend) if backend in accelerator.POLICIES else None


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that serves ``backend`` (from :func:`select`) on ``device``."""
    # Where fast has no kernel it means exact, and exact is MLX there.
    if backend == "mlx" or (backend in ("auto", "int8") and mlx_backend.is_apple_silicon(device)):
        return "mlx" if mlx_backend.available() else "torch"
    if backend == "torch" or not accelerator.serves(device):
        return "torch"
    return "triton" if backend == "auto" else backend


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend: str = "auto") -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``(..., K)`` and a packed ``weight`` ``(N, K)``, in the dtype of ``x``."""
    name = resolve(backend, x.device)
    if name in accelerator.POLICIES:
        return accelerator.linear(x, weight, bias, name)
    return BACKENDS[name].linear(x, weight, bias)
