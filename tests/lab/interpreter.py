"""Triton's interpreter, brought closer to a GPU. Import it first in a process: it sets TRITON_INTERPRET.

Three differences matter here: a GPU rounds FP32 to BF16 to nearest even, the interpreter truncates; it multiplies BF16
matrices as numbers, the interpreter as their bit patterns; and a loop index has a ``to`` method.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FLOATS = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}


def _as_torch(data: np.ndarray, dtype) -> torch.Tensor:
    data = np.ascontiguousarray(data)
    if dtype == tl.bfloat16:  # which the interpreter keeps as uint16
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _round_to_nearest() -> None:
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source not in _FLOATS or target not in _FLOATS:
            return original(data, source, target, rounding)
        if source == tl.float16:
            data = data.view(np.float16)
        elif source == tl.float32:
            data = data.view(np.float32)
        converted = _as_torch(data, source).to(_FLOATS[target])
        return converted.view({2: torch.int16, 4: torch.int32}[target.primitive_bitwidth // 8]).numpy().view(
            {2: np.uint16, 4: np.uint32}[target.primitive_bitwidth // 8]).reshape(data.shape)

    interpreter._convert_float = convert


def _multiply_bfloat16() -> None:
    original = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return original(self, widen(a), widen(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def scalar(value) -> tl.tensor:
    """A loop index as the tensor it is on a GPU."""
    return tl.core.tensor(interpreter.TensorHandle(np.array([int(value)], dtype=np.int32), tl.int32), tl.int32)


def _tensor_loop_index() -> None:
    original = interpreter._patch_lang_core

    def patched(lang, *scope):
        original(lang, *scope)
        base = lang.range

        def tensor_range(*args, **kwargs):
            return (scalar(i) for i in base(*args, **kwargs))

        if scope:
            scope[0].set_attr(lang, "range", tensor_range)
        else:
            lang.range = tensor_range

    interpreter._patch_lang_core = patched


def _integer_flags() -> None:
    # Triton up to 3.7 gives a bool argument one bit, but four bytes of data.
    original = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: original(int(arg) if type(arg) is bool else arg)


_round_to_nearest()
_multiply_bfloat16()
_tensor_loop_index()
_integer_flags()
