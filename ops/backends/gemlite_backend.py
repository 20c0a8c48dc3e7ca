"""GemLite's kernels on the canonical packed form, without a converted copy.

GemLite stores ``W_q`` ``(K * bits / 8, N)`` and tables ``(K / group, N)``: the transposes of the canonical tensors.
Its kernels take strides, so they read transposed views, and the host's copy of a weight stays the only one. (How fast
its kernels are with these strides is not measured.)

The activations keep their dtype; products are accumulated in FP32. GemLite reads its launch configurations from a
process-wide table; for a shape that is not in it, it measures candidates for minutes. We enter one configuration for
each shape that we multiply, and never replace an entry. Ours do not split K, because the parts of a split are added in
the output dtype.

Triton before 3.9 measures even a single candidate, with a device synchronisation, 256 MB of device memory and an eighth
of a second for each shape. :func:`_unmeasured` prevents it.
"""

import contextvars
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..devices import AMPERE, current, gpu
from ..packed import LEVELS, Form, Packed
from . import libraries
from .interface import Digits

NAME = "gemlite"
DEVICES: tuple[str, ...] = ("cuda", "xpu")
LIBRARY = libraries.GEMLITE

#: The fields of GemLite's ``metadata``, in order.
METADATA = ("scaled_activations", "W_nbits", "group_size", "unpack_mask", "elements_per_sample", "input_dtype",
            "output_dtype", "acc_dtype", "meta_dtype", "channel_scale_mode", "W_group_mode", "data_contiguous")
#: GemLite's codes of dtypes in ``metadata``.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Our forms -> GemLite's ``W_group_mode``.
MODES: dict[Form, int] = {"zeropoint": 3, "affine": 4}

#: GemLite has a kernel for up to this many rows, where reading the weight is the bound, and a plain GEMM for more,
#: which its author measured slower than a dense product.
SPLIT_K_ROWS = 64
#: GemLite reads scales in tiles of this many out features, past the end of the table if need be.
_TILE_N = 64
#: GemLite counts the elements of activations and results in 32 bits.
_MAX_ELEMENTS = 2**31
#: Conservative and not tuned: both kernels compile to 34 KB of shared memory or less (consumer GPUs have 99 KB).
_TILE = {"BLOCK_SIZE_N": _TILE_N, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8, "A_load_order": 0, "num_warps": 4,
         "num_stages": 3, "num_ctas": 1}
_CONFIGS = {"GEMM_SPLITK": {**_TILE, "BLOCK_SIZE_M": 16, "SPLIT_K": 1}, "GEMM": {**_TILE, "BLOCK_SIZE_M": 64}}

#: GemLite's first calls from two threads at once are unsafe, and every new shape is a first call.
_LOCK = threading.Lock()


def problem(device: torch.device | None, digits: Digits = 0) -> str | None:
    """Why GemLite cannot be used on ``device`` (None: on any), or None."""
    if device is not None:
        vendor, name, capability = here = gpu(device)
        if vendor != "nvidia":
            return f"gemlite is untested on {name}"
        if capability < AMPERE:  # its kernels compile to scalar code there
            return f"gemlite is slow before Ampere, {name} is {here.architecture}"
    found = libraries.missing(LIBRARY) or libraries.problem(libraries.TRITON)
    if found is not None or device is None:  # its import needs a GPU, and sets a Triton allocator in the context
        return found
    return contextvars.copy_context().run(libraries.problem, LIBRARY, _modules)


def serves(device: torch.device, rows: int, packed: Packed, dtype: torch.dtype, digits: Digits, named: bool) -> bool:
    """Weights whose out features fill whole tiles; few rows, or by name any number that GemLite can count."""
    return (not digits and dtype in DTYPES and packed.group * packed.bits % 8 == 0 and packed.n % _TILE_N == 0
            and (named or rows <= SPLIT_K_ROWS) and rows * max(packed.n, packed.k) < _MAX_ELEMENTS)


def metadata_fields(packed: Packed, mode: int, dtype: torch.dtype) -> list[int]:
    """The fields of :data:`METADATA` for a weight of GemLite's ``mode`` and activations of ``dtype``, accumulated in
    FP32."""
    fields = dict.fromkeys(METADATA, 0) | {
        "W_nbits": packed.bits, "group_size": packed.group, "unpack_mask": 2**packed.bits - 1,
        "elements_per_sample": 8 // packed.bits, "input_dtype": DTYPES[dtype], "output_dtype": DTYPES[dtype],
        "acc_dtype": DTYPES[torch.float32], "meta_dtype": DTYPES[torch.float32], "W_group_mode": mode,
        "data_contiguous": 1}
    return list(fields.values())


def multiply(x: torch.Tensor, packed: Packed, digits: Digits = 0) -> torch.Tensor:
    """``x @ W.T`` for ``x`` ``(M, K)``, M at least 1; ``(M, N)`` in the dtype of ``x``."""
    codes, scale, shift, bits, form = packed.contiguous()
    mode, factor = MODES["zeropoint"], 1
    if shift is None:
        factor, origin = LEVELS[bits]
        zeros = scale.new_full((1,), origin / factor, dtype=torch.float32)
    else:
        # GemLite multiplies and adds in the dtype of the tables, the reference in FP32.
        mode, scale, zeros = MODES[form], scale.float(), shift.float().t()
    kernel = "GEMM_SPLITK" if x.shape[0] <= SPLIT_K_ROWS else "GEMM"
    with _LOCK, current(x.device):
        core, utils = _modules()
        # FP16 and BF16 share configurations in GemLite's table.
        kind = DTYPES[torch.float16 if x.dtype == torch.bfloat16 else x.dtype]
        key = str((utils.get_closest_m(x.shape[0]), packed.n, packed.k, packed.group, 8 // bits, kind * 100 + bits))
        core.GEMLITE_TRITON_CONFIG_CACHE.setdefault(kernel, {}).setdefault(key, dict(_CONFIGS[kernel]))
        # kernel[0] is the variant for integer codes.
        with _unmeasured(core.GEMLITE_TRITON_MAPPING[kernel].kernel[0]):
            out = torch.ops.gemlite.forward_functional(x.contiguous(), None, [codes.t(), scale.t(), zeros],
                                                       metadata_fields(packed, mode, x.dtype),
                                                       core.GEMLITE_MATMUL_TYPES_MAPPING[kernel])
    return out if factor == 1 else out.mul_(factor)


def _modules() -> tuple[Any, Any]:
    """GemLite's modules, imported in a context of their own: the Triton allocator that GemLite sets stays inside."""
    core, utils = (contextvars.copy_context().run(importlib.import_module, f"gemlite.{name}")
                   for name in ("core", "triton_kernels.utils"))
    return core, utils


@contextmanager
def _unmeasured(tuner: Any) -> Iterator[None]:
    """Makes the ``triton.runtime.Autotuner`` of a kernel accept its only candidate without measuring it."""
    # A cached property, so the object has the attribute only after its first use.
    measure = vars(tuner).get("do_bench")
    tuner.do_bench = lambda _call, **_options: 0.0
    try:
        yield
    finally:
        del tuner.do_bench
        if measure is not None:
            tuner.do_bench = measure
