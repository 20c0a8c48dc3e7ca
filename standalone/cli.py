"""The command line: generate, demo, inspect, convert."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

from .. import __version__
from ..loaders import TARGETS, ModelFileError, find_repository, is_repository, load_transformer, save_transformer
from ..ops import backends
from ..ops.devices import DTYPES, default_dtype
from .inspect import inspect, report

# What draws needs diffusers, which ComfyUI does not bring; the other commands do without it.
if TYPE_CHECKING:
    from .generate import Result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bonsai-image", description="Bonsai Image 4B on packed weights, headless.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument("--steps", type=int, default=4)
    drawing.add_argument("--seed", type=_seed, default=0)
    drawing.add_argument("--backend", choices=backends.NAMES, default="auto", help="what multiplies packed weights")
    drawing.add_argument("--precision", choices=backends.PRECISIONS, default="exact",
                         help="fast rounds activations to int8 (NVIDIA cards since Ampere; exact elsewhere)")
    drawing.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of activations")
    drawing.add_argument("--device", default=None, help="cpu, cuda, mps ... (default: the fastest there is)")
    drawing.add_argument("--json", action="store_true", help="print settings and stage figures as JSON")

    command = commands.add_parser("generate", parents=[drawing], help="draw a prompt with a downloaded pack")
    command.add_argument("--pack", type=Path, required=True, help="folder of a downloaded repository")
    command.add_argument("--prompt", required=True)
    command.add_argument("--image", type=Path, action="append", default=[], help="a reference to edit (repeatable)")
    command.add_argument("--transformer", type=Path, help="another diffusion model, in any format, for the pack's own")
    command.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16")
    command.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16")
    command.add_argument("--out", type=_picture, default="bonsai.png", help="PNG to write, or to replace")

    command = commands.add_parser("demo", parents=[drawing], help="draw a contact sheet with a trained miniature")
    command.add_argument("--out", type=_picture, default="bonsai-demo.png", help="PNG to write, or to replace")

    command = commands.add_parser("inspect", help="what a file, folder or repository holds")
    command.add_argument("path", type=Path)
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("convert", help="transcode a diffusion model without loss")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--to", choices=TARGETS, required=True, dest="format")
    command.add_argument("--base3", action="store_true", help="store ternary codes five a byte (with --to comfy)")

    # Listed here; run by __main__ before this module, and torch with it, is imported.
    commands.add_parser("download", help="fetch a pack from the Hugging Face Hub", add_help=False)
    return parser


def _seed(text: str) -> int:
    if not 0 <= (seed := int(text)) < 2**63:
        raise argparse.ArgumentTypeError("a seed is a number from 0 to 2**63 - 1")
    return seed


def _picture(text: str) -> Path:
    # Before minutes are spent on a picture that has nowhere to go.
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no name for a picture, which has to end in .png")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written, because {folder} is no folder that takes files")
    return path


def _device(name: str | None) -> torch.device:
    # Unchecked, it names what PyTorch was built for, which on Linux is CUDA also where there is no card.
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name is None:
        return best
    # PyTorch has a different exception for each way in which a device can be missing.
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is nothing that this PyTorch can use; leave it out for {best}.") from error
    return torch.device(name)


def _table(results: dict[str, Result]) -> str:
    """Seconds and megabytes of every stage, a pair of columns for each of ``results``."""
    rows = [f"{'':<22}" + "".join(f"{name:>20}" for name in results) if len(results) > 1 else "",
            f"{'stage':<22}" + f"{'seconds':>9}{'MB in use':>11}" * len(results)]
    stages = [result.stages for result in results.values()]
    rows += [f"{name:<22}" + "".join(f"{each[name]['seconds']:>9.2f}{each[name]['megabytes']:>11.0f}"
                                     for each in stages) for name in stages[0]]
    totals = (sum(stage["seconds"] for stage in each.values()) for each in stages)
    rows.append(f"{'total':<22}" + "".join(f"{total:>9.2f}{'':>11}" for total in totals).rstrip())
    return "\n".join(rows)


def _run_on(args: argparse.Namespace) -> tuple[torch.device, torch.dtype, str]:
    device = _device(args.device)
    dtype = default_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype]
    return device, dtype, backends.select(args.backend, args.precision)


def _reference(path: Path) -> Image.Image:
    try:
        # Cameras store many pictures lying on their side, with a note.
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ModelFileError(path, "an image", str(error), "give a PNG or JPEG file with --image") from error


def _generate(args: argparse.Namespace) -> None:
    from .generate import generate

    device, dtype, backend = _run_on(args)
    result = generate(args.pack, [args.prompt], device, dtype, backend, args.width, args.height, args.steps, args.seed,
                      progress=not args.json, images=[_reference(path) for path in args.image],
                      transformer=args.transformer)
    result.save(args.out)
    if args.json:
        print(json.dumps({"out": str(args.out), "settings": result.settings, "stages": result.stages}))
    else:
        print(f"\n{_table({args.out.name: result})}\n\n{args.out}: {args.width} x {args.height}, "
              f"{result.settings['variant']}, {result.settings['dtype']} on {device}")


def _demo(args: argparse.Namespace) -> None:
    from . import demo
    from .generate import save_png

    device, dtype, backend = _run_on(args)
    results = demo.draw(device, dtype, backend, args.steps, args.seed, progress=not args.json)
    save_png(demo.sheet(results), {name: result.settings for name, result in results.items()}, args.out)
    if args.json:
        print(json.dumps({"out": str(args.out), "variants": {name: {
            "settings": result.settings, "stages": result.stages, "file_bytes": demo.file_bytes(name)}
            for name, result in results.items()}}))
    else:
        sizes = ", ".join(f"{name} {demo.file_bytes(name) / 1e6:.2f} MB" for name in results)
        print(f"\n{_table(results)}\n\nweights: {sizes}\n{args.out}: {len(demo.PROMPTS)} prompts by "
              f"{len(results)} variants of the miniature on {device}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one sentence on stderr where the input cannot be used."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "generate":
            _generate(args)
        elif args.command == "demo":
            _demo(args)
        elif args.command == "inspect":
            parts = inspect(args.path)
            print(json.dumps(parts, indent=2) if args.json else "\n".join(map(report, parts)))
        else:
            source = find_repository(args.source).transformer if is_repository(args.source) else args.source
            save_transformer(load_transformer(source), args.target, args.format, args.base3)
            print(args.target)
    except (ModelFileError, ValueError, OSError) as error:
        print(f"bonsai-image: {error}", file=sys.stderr)
        return 2
    return 0
