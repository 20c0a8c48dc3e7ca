"""How much device memory an image takes at most, as counted without a GPU (``tests/lab/count_memory.py``).

Not in it: the workspaces of cuDNN and cuBLAS, what the allocator cannot fill, and CUDA's own context, together a few
hundred megabytes.
"""

import torch

from ..loaders import Repository
from ..loaders.opening import tensor_files

#: Megabytes on the device while a prompt is encoded: the 4-bit text encoder, and its activations for one prompt.
_TEXT_ENCODER, _PROMPT = 1809, 149
#: The ternary diffusion model and the VAE. The binary one has 460 MB less.
_MODELS = 1544
#: Megabytes of activations in a step: a fixed part, and for each token, of the image, the text and the references.
_STEP = {"exact": (86.3, 0.1319), "fast": (49.0, 0.1442)}
#: The VAE, and its activations for each pixel.
_VAE, _PIXEL = 168, 0.001546
_TEXT_TOKENS, _REFERENCE_TOKENS = 512, 4096
#: The weights of a text encoder of full size take more than this; the figures are not those of a miniature.
_FULL_SIZE = 1_000_000_000


def counted_peak(width: int, height: int, images: int = 1, references: int = 0, precision: str = "exact") -> float:
    """Megabytes that ``images`` at once take at the peak of the three stages, each stage's weights included."""
    fixed, token = _STEP[precision]
    tokens = width * height // 256 + _TEXT_TOKENS + references * _REFERENCE_TOKENS
    return max(_TEXT_ENCODER + images * _PROMPT, _MODELS + fixed + images * tokens * token,
               _VAE + width * height * _PIXEL)


def note(repository: Repository, device: torch.device, width: int, height: int, references: int,
         precision: str) -> str | None:
    """What to tell a user before the models are loaded, or None where nothing is counted."""
    encoder_bytes = sum(file.stat().st_size for file in tensor_files(repository.text_encoder))
    if device.type != "cuda" or encoder_bytes < _FULL_SIZE:
        return None
    needed, free = counted_peak(width, height, 1, references, precision), torch.cuda.mem_get_info(device)[0] / 1e6
    text = f"{width} x {height} takes about {needed / 1e3:.1f} GB of GPU memory, of which {free / 1e3:.1f} GB are free."
    return text if free >= needed else f"{text} It may not fit: close what else uses the GPU, or choose a smaller size."
