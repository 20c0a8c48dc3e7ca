"""stable-diffusion.cpp's diffusion model, as tests/lab/stable_diffusion.sh builds it."""

import ctypes
import os
from pathlib import Path

import torch

FOLDER = os.environ.get("BONSAI_SDCPP", "")
BUILD = "build stable-diffusion.cpp with tests/lab/stable_diffusion.sh and set BONSAI_SDCPP to its folder"
_FLOATS = ctypes.POINTER(ctypes.c_float)


class Engine:
    """One file loaded by stable-diffusion.cpp; call it with a latent, an embedding and the time for one forward pass.

    Args:
        path: GGUF file of a diffusion model, in the names of ComfyUI.
        threads: Of the products.
    """

    def __init__(self, path: Path, threads: int = 1):
        self.threads, self.library = threads, ctypes.CDLL(str(Path(FOLDER) / "libflux.so"))
        self.library.load.restype = ctypes.c_void_p
        self.library.unload.argtypes = [ctypes.c_void_p]
        self.library.forward.restype = ctypes.c_bool
        self.library.forward.argtypes = [ctypes.c_void_p, ctypes.c_int, _FLOATS, *[ctypes.c_int64] * 3, _FLOATS,
                                         *[ctypes.c_int64] * 2, ctypes.c_float, _FLOATS]
        self.model = self.library.load(str(path).encode())
        assert self.model, "stable-diffusion.cpp does not load the file"

    def __call__(self, x: torch.Tensor, context: torch.Tensor, time: float) -> torch.Tensor:
        x, context, out = x.contiguous(), context.contiguous(), torch.empty(x.shape)
        data = [ctypes.cast(tensor.data_ptr(), _FLOATS) for tensor in (x, context, out)]
        assert self.library.forward(self.model, self.threads, data[0], *x.shape, data[1], *context.shape, time,
                                    data[2])
        return out

    def close(self) -> None:
        self.library.unload(self.model)
