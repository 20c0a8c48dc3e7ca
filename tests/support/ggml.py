"""ggml itself as the reference: its reader of GGUF files and its dequantizers, through ctypes."""

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

_F32 = 0
_POINTER = ctypes.c_void_p
#: Packages that bring the library along.
_PACKAGES = ("llama_cpp", "stable_diffusion_cpp")


class _Traits(ctypes.Structure):
    _fields_ = [("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
                ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool),
                ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, ctypes.c_int64))]


class _Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", _POINTER)]


class Ggml:
    """The functions of ``libggml-base`` that these tests need."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        for name, result, *arguments in (
                ("gguf_init_from_file", _POINTER, ctypes.c_char_p, _Parameters),
                ("gguf_free", None, _POINTER),
                ("gguf_get_data_offset", ctypes.c_size_t, _POINTER),
                ("gguf_get_n_tensors", ctypes.c_int64, _POINTER),
                ("gguf_get_tensor_name", ctypes.c_char_p, _POINTER, ctypes.c_int64),
                ("gguf_get_tensor_type", ctypes.c_int, _POINTER, ctypes.c_int64),
                ("gguf_get_tensor_offset", ctypes.c_size_t, _POINTER, ctypes.c_int64),
                ("gguf_get_tensor_size", ctypes.c_size_t, _POINTER, ctypes.c_int64),
                ("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int)):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    @classmethod
    def find_or_skip(cls) -> "Ggml":
        """The library that BONSAI_GGML names, or that an installed package brings. It has to know Q2_0."""
        specs = filter(None, map(importlib.util.find_spec, _PACKAGES))
        found = [file for spec in specs for file in Path(spec.origin).parent.glob("lib/libggml-base.*")]
        path = os.environ.get("BONSAI_GGML") or next(iter(found), None)
        if path is None:
            pytest.skip("no ggml: install llama-cpp-python, or set BONSAI_GGML to a libggml-base")
        return cls(Path(path))

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Every tensor of a GGUF file by name, dequantized by ggml to float32, flat."""
        context = self.library.gguf_init_from_file(str(path).encode(), _Parameters(no_alloc=True))
        assert context, "ggml refuses the file"
        data = path.read_bytes()[self.library.gguf_get_data_offset(context) :]
        result = {}
        for i in range(self.library.gguf_get_n_tensors(context)):
            offset = self.library.gguf_get_tensor_offset(context, i)
            stored = data[offset : offset + self.library.gguf_get_tensor_size(context, i)]
            name = self.library.gguf_get_tensor_name(context, i).decode()
            result[name] = self._floats(self.library.gguf_get_tensor_type(context, i), stored)
        self.library.gguf_free(context)
        return result

    def _floats(self, kind: int, stored: bytes) -> np.ndarray:
        traits = self.library.ggml_get_type_traits(kind).contents
        if kind == _F32:
            return np.frombuffer(stored, np.float32)
        values = np.empty(len(stored) // traits.type_size * traits.blck_size, np.float32)
        traits.to_float(stored, values.ctypes.data, values.size)
        return values
