"""GemLite's kernels on the canonical packed form, without a converted copy.

GemLite stores ``W_q`` ``(K * bits / 8, N)`` and tables ``(K / group, N)``: the transposes of the canonical tensors.
Its kernels take strides, so transposed *views* serve. The host's copy of a weight, wherever it keeps it, stays the
only one. (How fast its kernels are with these strides is not measured.)

The activations keep their dtype; products are accumulated in FP32. GemLite reads its launch configurations from a
process-wide table and otherwise measures candidates for minutes. Ours are entered for the shapes that we multiply, and
never replace an entry. They do not split K: a split is added up in the output dtype.

So there is one candidate for every shape. Triton before 3.9 measures even that, with a device synchronisation, 256 MB
of device memory and an eighth of a second for each shape; here it does not.
"""

from __future__ import annotations

import contextvars
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .choice import GEMLITE_COLUMNS
from .torch_backend import LEVELS

#: GemLite's codes of dtypes.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: GemLite's W_group_mode: ``(code - zero) * scale`` and ``code * scale + zero``.
_MINUS_ZERO, _PLUS_ZERO = 3, 4

#: Above so many rows GemLite's plain GEMM, up to there the kernel for few rows.
SPLIT_K_ROWS = 64
#: Conservative and not tuned: both kernels compile to 34 KB of shared memory or less (consumer cards have 99 KB).
_TILE = {"BLOCK_SIZE_N": GEMLITE_COLUMNS, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8, "A_load_order": 0, "num_warps": 4,
         "num_stages": 3, "num_ctas": 1}
_CONFIGS = {"GEMM_SPLITK": {**_TILE, "BLOCK_SIZE_M": 16, "SPLIT_K": 1}, "GEMM": {**_TILE, "BLOCK_SIZE_M": 64}}

#: GemLite's first calls from two threads at once are unsafe, and every new shape is a first call.
_LOCK = threading.Lock()


def _gemlite():
    """GemLite, imported in a context of its own: the Triton allocator it sets is not seen outside."""
    contextvars.copy_context().run(importlib.import_module, "gemlite")
    return importlib.import_module("gemlite.core"), importlib.import_module("gemlite.triton_kernels.utils")


@contextmanager
def _unmeasured(tuner: Any) -> Iterator[None]:
    """Have a kernel's ``triton.runtime.Autotuner`` take its one candidate as it is."""
    # A cached property: the object has the attribute only once somebody has asked for it.
    measure = vars(tuner).get("do_bench")
    tuner.do_bench = lambda _call, **_options: 0.0
    try:
        yield
    finally:
        if measure is None:
            del tuner.do_bench
        else:
            tuner.do_bench = measure


def linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, bits: int,
           form: str) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1, and a canonical packed weight, N a multiple of 64; ``(M, N)`` in
    the dtype of ``x``.

    The caller makes the device of ``x`` current. Raises ImportError without gemlite.
    """
    (rows, k), n, groups = x.shape, codes.shape[0], scale.shape[1]
    dtype, mode, factor = _DTYPES[x.dtype], _MINUS_ZERO, 1
    if form == "symmetric":
        factor, origin = LEVELS[bits]
        zeros = scale.new_full((1,), origin / factor, dtype=torch.float32)
    else:
        # GemLite multiplies and adds in the dtype of the tables; the reference does in FP32.
        mode = _PLUS_ZERO if form == "affine" else _MINUS_ZERO
        scale, zeros = scale.float(), shift.float().t()
    metadata = [0, bits, k // groups, 2**bits - 1, 8 // bits, dtype, dtype, 0, 0, 0, mode, 1]
    with _LOCK:
        core, utils = _gemlite()
        kernel = "GEMM_SPLITK" if rows <= SPLIT_K_ROWS else "GEMM"
        # FP16 and BF16 share configurations in GemLite's table.
        kind = _DTYPES[torch.float16] if x.dtype == torch.bfloat16 else dtype
        key = str((utils.get_closest_m(rows), n, k, k // groups, 8 // bits, kind * 100 + bits))
        core.GEMLITE_TRITON_CONFIG_CACHE.setdefault(kernel, {}).setdefault(key, dict(_CONFIGS[kernel]))
        # Of its two kernels the one for integer codes.
        with _unmeasured(core.GEMLITE_TRITON_MAPPING[kernel].kernel[0]):
            out = torch.ops.gemlite.forward_functional(x, None, [codes.t(), scale.t(), zeros], metadata,
                                                       core.GEMLITE_MATMUL_TYPES_MAPPING[kernel])
    return out if factor == 1 else out.mul_(factor)
