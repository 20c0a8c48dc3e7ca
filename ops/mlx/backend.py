"""The MLX backend: ``mx.quantized_matmul`` on the packed words, for Apple silicon.

The canonical codes are MLX's words, so nothing is repacked. This file says when MLX serves; importing it does not
import MLX. What runs in MLX is in ``ops/mlx/arrays.py`` (one product) and ``ops/mlx/klein.py`` (the whole
transformer).

MLX computes ``scales * code + biases``. The symmetric and affine forms of ``ops/packed.py`` are exactly that; the
zeropoint form ``s * (c - z)`` would need the rounded product ``-s * z``, so torch serves such weights.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import platform

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import torch_backend

_LOG = logging.getLogger(__name__)

#: Group sizes that ``mx.quantized_matmul`` takes.
GROUPS = (32, 64, 128)

_REMEDIES = ("reinstall it for this macOS (pip install --force-reinstall --no-cache-dir mlx mlx-metal, in a native "
             "arm64 Python), or update macOS (26.0 and 26.1 to 26.2) and MLX")


def is_apple_silicon(device: torch.device) -> bool:
    """Whether ``device`` is the GPU of an Apple silicon Mac, the one place where ``auto`` means MLX."""
    return device.type == "mps" and platform.machine() == "arm64"


@functools.cache
def problem() -> str | None:
    """Why MLX cannot serve on this machine, in one sentence, or None. Imports MLX and multiplies once."""
    if importlib.util.find_spec("mlx") is None:
        return "MLX is not installed (pip install mlx)"
    # A metallib built for a newer macOS fails at import, an older MLX refuses 1 bit (ValueError), a missing kernel is
    # a RuntimeError, and a miscompiled one multiplies wrongly.
    try:
        from . import arrays

        error = arrays.self_check_error()
    except ValueError as failure:
        return (f"MLX {importlib.metadata.version('mlx')} is too old ({str(failure).splitlines()[0]}): update it "
                "(pip install --upgrade mlx)")
    except (ImportError, RuntimeError) as failure:
        return f"MLX fails on this machine ({str(failure).splitlines()[0]}): {_REMEDIES}"
    if error is not None:
        return f"MLX multiplies packed weights wrongly on this machine ({error}): {_REMEDIES}"
    return None


@functools.cache
def available() -> bool:
    """Whether MLX serves on this machine. Decided once; a problem is named in the log, once."""
    found = problem()
    if found is not None:
        _LOG.warning("Bonsai Image: %s; torch serves instead.", found)
    return found is None


def serves(weight: QuantizedTensor) -> bool:
    """Whether MLX's product with ``weight`` is exact in form."""
    return weight._params.form != "zeropoint" and weight._params.group in GROUPS


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``(..., K)`` and a packed ``weight`` ``(N, K)``, in the dtype of ``x``.

    torch serves what MLX cannot: zero points, gradients, float64 (no Apple GPU has it), no rows at all.
    """
    if not serves(weight) or x.requires_grad or x.dtype == torch.float64 or not x.numel():
        return torch_backend.linear(x, weight, bias)
    from . import arrays

    return arrays.linear(x, weight, bias)


def clear_cache() -> None:
    """Give the memory that MLX keeps for reuse back to the system. Call it when a model is dropped."""
    from . import arrays

    arrays.clear_cache()
