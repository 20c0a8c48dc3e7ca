"""A step of full size beside stable-diffusion.cpp on this machine's CPU, from the same weights.

    BONSAI_SDCPP=FOLDER python benchmarks/sdcpp.py [--side 512] [--steps 2] [--modes auto fast q8_0 q4_0 q2_0]

``FOLDER`` is what ``tests/lab/stable_diffusion.sh FOLDER`` builds, with the CPU's own instructions and llamafile's
kernels. Random ternary weights of FLUX.2 Klein 4B: ours compute on them as they are, ``q2_0`` is the same file in GGUF,
and ``q8_0`` and ``q4_0`` are the same weights rounded to ggml's types, which is what people run. ``dense`` is diffusers
in BF16, of which the last column is the error of the final latent: that all compute the same model shows in it.

Each mode in a process of its own; seconds are the median step, GB the peak RSS after loading.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from cpu_image import MODES, arguments, compare, denoise, noise_and_text, schedule
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from load import FULL, peak_bytes, random_model

from bonsai_image.loaders import gguf, names, save_transformer
from bonsai_image.ops.packed import is_packed
from bonsai_image.tests.support.engine import Engine

GGML = ("q8_0", "q4_0", "q2_0")
#: ggml's own 4 bits, which our reader refuses: 32 weights and a scale.
Q4_0 = gguf.Type(2, "Q4_0", 32, 18)


def write_gguf(mode: str, out: Path) -> None:
    """The random model beside ``out`` for a mode of ggml: as ``save_transformer`` writes it, or rounded by ``gguf``."""
    if mode not in GGML:
        return
    model, path = random_model(FULL, 2, Path("random")), out.with_suffix(".gguf")
    if mode == "q2_0":
        save_transformer(model, path, "gguf")
        return
    kind, number = ((gguf.Q8_0, GGMLQuantizationType.Q8_0) if mode == "q8_0" else (Q4_0, GGMLQuantizationType.Q4_0))
    tensors = {name.replace("_norm.weight", "_norm.scale"): tensor
               for name, tensor in names.to_comfyui(model.tensors).items()}
    entries = gguf.layout({name: (kind if is_packed(tensor) else gguf.BF16, tuple(tensor.shape))
                           for name, tensor in tensors.items()})
    gguf.write(path, entries, (torch.from_numpy(quantize(tensor.dequantize().float().numpy(), number))
                               if is_packed(tensor) else tensor for tensor in tensors.values()), {})


def denoise_by_ggml(path: Path, side: int, steps: int, out: Path) -> None:
    """The steps of ``cpu_image.denoise`` in FP32, by stable-diffusion.cpp."""
    engine, tokens = Engine(path, torch.get_num_threads()), side // 16
    latent, text = noise_and_text(tokens)
    latent, seconds = latent[0].float().t().reshape(-1, tokens, tokens), []
    Path("/proc/self/clear_refs").write_text("5")
    for now, then in pairwise(schedule(steps)):
        start = time.perf_counter()
        latent = latent + (then - now) * engine(latent, text[0].float(), float(now))
        seconds.append(time.perf_counter() - start)
    torch.save({"latent": latent.flatten(1).t()[None], "seconds": statistics.median(seconds), "peak": peak_bytes()},
               out)


def main() -> None:
    # Of 2 steps, all times are BF16 numbers.
    args = arguments(__doc__, (*MODES, *GGML), ("dense", "auto", "fast", "q8_0", "q4_0"), 2)
    if not args.out:
        compare(__file__, args, write_gguf)
    elif (mode := args.modes[0]) in GGML:
        denoise_by_ggml(args.out.with_suffix(".gguf"), args.side, args.steps, args.out)
    else:
        denoise(mode, args.side, args.steps, args.out)


if __name__ == "__main__":
    main()
