"""The two ends of an image on this machine's CPU: encoding a prompt, and decoding 1024 x 1024 by each decoder.

    python benchmarks/encode_decode.py [--side 1024] [--repeats 3] [--ways dense exact auto full small taef2]

Random weights of full size. ``dense``, ``exact`` and ``auto`` encode 512 tokens with the 27 layers of Qwen3-4B that
FLUX.2 Klein reads, in BF16: dense, with weights of 4 bits, and with what ``auto`` finds the fastest. ``full`` and
``small`` decode with diffusers' FLUX.2 VAE and with one whose decoder is narrower, in BF16 and FP32, and ``taef2`` with
ComfyUI's tiny one (COMFYUI_PATH, in the Python that runs it). Each in a process of its own: the median of seconds, and
peak RSS above the loaded model. How far BF16 is from FP32 in an image is measured with the trained VAE of the
miniature.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from cpu_image import CPU, TEXT_TOKENS
from diffusers import AutoencoderKLFlux2
from linear import cpu_name
from load import peak_bytes

from bonsai_image.loaders.qwen3 import TAPPED_LAYERS, Qwen3Config, qwen3_shapes
from bonsai_image.ops.backends import Setting
from bonsai_image.ops.packed import is_packed, pack_codes, packed_weight
from bonsai_image.standalone.models import text_encoder_module, vae_module

ENCODERS, DECODERS = ("dense", "exact", "auto"), ("full", "small", "taef2")
QWEN3 = Qwen3Config(num_hidden_layers=max(TAPPED_LAYERS))
SMALL = (96, 192, 384, 384)
VAE = Path(__file__).parent.parent / "miniature" / "ternary" / "vae"


def encoder(way: str):
    """What encodes, with the weights of the MLX repositories: 4 bits, affine, groups of 64."""
    tensors = {}
    for name, shape in qwen3_shapes(QWEN3).items():
        if len(shape) < 2:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        n, k = shape
        scale = torch.rand(n, k // 64).mul(0.01).bfloat16()
        tensors[name] = packed_weight(pack_codes(torch.randint(0, 16, shape, dtype=torch.uint8), 4), scale, 4, "affine",
                                      -7.5 * scale)
        if way == "dense":
            tensors[name] = tensors[name].dequantize()
    assert way == "dense" or any(is_packed(tensor) for tensor in tensors.values())
    module = text_encoder_module(SimpleNamespace(config=QWEN3, tensors=tensors), CPU, torch.bfloat16,
                                 Setting("auto", "exact" if way == "dense" else way))
    ids = torch.randint(0, QWEN3.vocab_size, (1, TEXT_TOKENS))
    return partial(module, ids, attention_mask=torch.ones_like(ids))


def decoder(way: str, side: int, dtype: torch.dtype):
    """What decodes noise to an image of ``side`` pixels."""
    if way == "taef2":
        sys.path.insert(0, os.environ["COMFYUI_PATH"])
        from comfy.taesd.taesd import TAESD

        latent = torch.randn(1, 128, side // 16, side // 16)
        return partial(TAESD(latent_channels=128).to(dtype).decode, latent.to(dtype))
    narrow = {"decoder_block_out_channels": SMALL} if way == "small" else {}
    return partial(AutoencoderKLFlux2(**narrow).to(dtype).decode, torch.randn(1, 32, side // 8, side // 8).to(dtype))


@torch.inference_mode()
def measure(way: str, dtype: torch.dtype, side: int, repeats: int) -> None:
    run, seconds = encoder(way) if way in ENCODERS else decoder(way, side, dtype), []
    run()  # measures what is the fastest, and warms up
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(f"{way:>9}{str(dtype).removeprefix('torch.'):>10}{statistics.median(seconds):>9.2f}"
          f"{(peak_bytes() - held) / 1e9:>10.2f}", flush=True)


@torch.inference_mode()
def difference() -> tuple[float, float]:
    """The largest and the mean difference of a pixel (0 to 255) between the miniature's VAE in BF16 and in FP32, on
    noise."""
    latent = torch.randn(4, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    images = [vae_module(VAE, CPU, dtype).to(dtype).decode(latent.to(dtype), return_dict=False)[0].float().clamp(-1, 1)
              for dtype in (torch.float32, torch.bfloat16)]
    difference = (images[0] - images[1]).abs() * 127.5
    return float(difference.max()), float(difference.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=(*ENCODERS, *DECODERS), default=(*ENCODERS, "full", "small"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype:
        measure(args.ways[0], getattr(torch, args.dtype), args.side, args.repeats)
        return
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {TEXT_TOKENS} tokens, "
          f"{args.side} x {args.side}\n{'way':>9}{'dtype':>10}{'seconds':>9}{'peak GB':>10}", flush=True)
    for way in args.ways:
        for dtype in ("bfloat16",) if way in ENCODERS else ("bfloat16", "float32"):
            subprocess.run([sys.executable, __file__, "--ways", way, "--dtype", dtype, "--side", str(args.side),
                            "--repeats", str(args.repeats)], check=True)
    print("the miniature's VAE in BF16 is at most {:.2f} / 255 from FP32, on average {:.2f}".format(*difference()))


if __name__ == "__main__":
    main()
