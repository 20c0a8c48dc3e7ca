"""A step of full size inside ComfyUI on this machine's CPU: ComfyUI's own dense model beside ours.

    COMFYUI_PATH=FOLDER python benchmarks/comfyui_step.py [--side 512] [--steps 2] [--modes dense dense_bf16 auto fast]

Random ternary weights of FLUX.2 Klein 4B, as in ``cpu_image.py``, by the Python that runs ComfyUI. ``dense`` are the
same values in BF16, loaded by ComfyUI's own loader, which computes them in FP32 on a CPU; ``dense_bf16`` computes in
BF16, as our loader does where BF16 is fast. Each mode in a process of its own; seconds are the median step, GB the peak
RSS after loading, and the last column is how far the final latent is from that of the first mode.
"""

import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from cpu_image import arguments, compare, noise_and_text, schedule
from load import FULL, peak_bytes, random_model
from safetensors.torch import save_file

from bonsai_image.loaders import names, save_transformer
from bonsai_image.ops.backends import PRECISIONS, Setting
from bonsai_image.ops.packed import is_packed

MODES = ("dense", "dense_bf16", *PRECISIONS)


def write(mode: str, out: Path) -> None:
    """The file that ``mode`` loads, beside ``out``."""
    model, path = random_model(FULL, 2, Path("random")), out.with_suffix(".safetensors")
    if mode in PRECISIONS:
        save_transformer(model, path, "comfy")
    else:
        save_file({name: tensor.dequantize() if is_packed(tensor) else tensor
                   for name, tensor in names.to_comfyui(model.tensors).items()}, path)


def load(mode: str, path: Path):
    """The MODEL."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd

    from bonsai_image.nodes import models

    if mode in PRECISIONS:
        return models.load_model(str(path), setting=Setting("auto", mode))
    patcher = comfy.sd.load_diffusion_model(str(path))
    if mode == "dense_bf16":
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


@torch.inference_mode()
def denoise(mode: str, side: int, steps: int, out: Path) -> None:
    """The steps of ``cpu_image.denoise`` in ComfyUI."""
    patcher, tokens = load(mode, out.with_suffix(".safetensors")), side // 16
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    latent, text = (tensor.float() for tensor in noise_and_text(tokens))
    latent, seconds = latent.mT.reshape(1, -1, tokens, tokens), []
    Path("/proc/self/clear_refs").write_text("5")
    for now, then in pairwise(schedule(steps)):
        start = time.perf_counter()
        clean = patcher.model.apply_model(latent, now[None], c_crossattn=text)
        latent = latent + (then - now) * (latent - clean) / now
        seconds.append(time.perf_counter() - start)
    torch.save({"latent": latent, "seconds": statistics.median(seconds), "peak": peak_bytes()}, out)


def main() -> None:
    args = arguments(__doc__, MODES, MODES, 2)
    if args.out:
        denoise(args.modes[0], args.side, args.steps, args.out)
    else:
        compare(__file__, args, write)


if __name__ == "__main__":
    main()
