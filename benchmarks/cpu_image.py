"""Denoising one image on this machine's CPU with the full-size transformer: dense BF16 beside every precision.

    python benchmarks/cpu_image.py [--side 512] [--steps 4] [--modes dense expanded auto exact fast]

Random ternary weights of FLUX.2 Klein 4B in diffusers' module, as the command line uses it; each mode in a process of
its own, ``expanded`` with the weights expanded layer by layer. Printed are seconds a step (the median), peak RSS while
it denoises, and how far the final latent is from the dense one, whose weights have the same values. Text encoder and
VAE are left out: all modes share them.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from linear import cpu_name
from load import FULL, peak_bytes, random_model

from bonsai_image.ops import backends
from bonsai_image.ops.backends import Setting, choices
from bonsai_image.ops.packed import is_packed
from bonsai_image.standalone.models import transformer_module

CPU = torch.device("cpu")
TEXT_TOKENS = 512
MODES = ("dense", "expanded", "auto", "exact", "fast")


def coordinates(height: int, width: int, tokens: int) -> torch.Tensor:
    """Positions (time, row, column, token) of an image's tokens or of a text's, of shape (1, tokens, 4)."""
    return torch.cartesian_prod(torch.arange(1), *(torch.arange(size) for size in (height, width, tokens)))[None]


def noise_and_text(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed noise of ``tokens`` x ``tokens`` and a fixed random text, in BF16."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, tokens**2, FULL.in_channels, generator=generator).bfloat16(),
            torch.randn(1, TEXT_TOKENS, FULL.joint_attention_dim, generator=generator).bfloat16())


def schedule(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def build(mode: str) -> torch.nn.Module:
    model = random_model(FULL, 2, Path("random"))
    if mode == "dense":
        for name, tensor in model.tensors.items():
            model.tensors[name] = tensor.dequantize() if is_packed(tensor) else tensor
    if mode == "expanded":
        backends.PRECISIONS["exact"] = (0,)
    setting = Setting("auto", mode if mode in backends.PRECISIONS else "exact")
    found = choices(setting, CPU, model.tensors.values(), torch.bfloat16)
    print(f"{mode}: {', '.join(str(choice) for *_, choice in found) or 'torch'}", file=sys.stderr)
    return transformer_module(model, CPU, torch.bfloat16, setting)


@torch.inference_mode()
def denoise(mode: str, side: int, steps: int, out: Path) -> None:
    """Plain Euler steps from fixed noise and a fixed random text."""
    module, tokens = build(mode), side // 16
    latent, text = noise_and_text(tokens)
    places = {"img_ids": coordinates(tokens, tokens, 1), "txt_ids": coordinates(1, 1, TEXT_TOKENS)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = []
    for now, then in pairwise(schedule(steps)):
        start = time.perf_counter()
        flow = module(hidden_states=latent, encoder_hidden_states=text, timestep=now[None].bfloat16(), guidance=None,
                      **places, return_dict=False)[0]
        latent = (latent.float() + (then - now) * flow.float()).bfloat16()
        seconds.append(time.perf_counter() - start)
    torch.save({"latent": latent.float(), "seconds": statistics.median(seconds), "peak": peak_bytes()}, out)


def arguments(description: str | None, modes: Sequence[str], chosen: Sequence[str], steps: int) -> argparse.Namespace:
    """The options of a comparison of ``modes``; ``out`` only in the process of one mode, which writes there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--modes", nargs="+", choices=modes, default=chosen)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(script: str, args: argparse.Namespace, prepare: Callable[[str, Path], None] = lambda _mode, _out: None
            ) -> None:
    """Print a line for each mode, by ``script`` in a process of its own, once ``prepare`` has made what it needs."""
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.side} x {args.side}, "
          f"{args.steps} steps\n{'mode':>9}{'s/step':>9}{'of first':>9}{'peak GB':>9}{'latent error':>14}", flush=True)
    first = None
    for mode in args.modes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"{mode}.pt"
            prepare(mode, out)
            subprocess.run([sys.executable, script, "--modes", mode, "--side", str(args.side), "--steps",
                            str(args.steps), "--out", str(out)], check=True)
            found = torch.load(out, weights_only=True)
        first = first or found
        error = (found["latent"] - first["latent"]).norm() / first["latent"].norm()
        print(f"{mode:>9}{found['seconds']:>9.2f}{found['seconds'] / first['seconds']:>9.2f}"
              f"{found['peak'] / 1e9:>9.2f}{float(error):>14.4f}", flush=True)


def main() -> None:
    args = arguments(__doc__, MODES, MODES, 4)
    if args.out:
        denoise(args.modes[0], args.side, args.steps, args.out)
    else:
        compare(__file__, args)


if __name__ == "__main__":
    main()
