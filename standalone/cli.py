"""The command line: generate, demo, inspect, convert."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from .. import __version__
from ..loaders import TARGETS, PackError, find_repository, load_transformer, save_transformer
from ..loaders.files import tensor_files
from ..ops import backends
from ..ops.devices import DTYPES, default_dtype
from .generate import SIZE_STEP, Result, generate
from .inspect import inspect, report
from .miniature import write_miniature


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bonsai-image", description="Bonsai Image 4B on packed weights, headless.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument("--steps", type=int, default=4)
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--backend", choices=backends.NAMES, default="auto", help="what multiplies packed weights")
    drawing.add_argument("--precision", choices=backends.PRECISIONS, default="exact",
                         help="fast rounds activations to int8 (NVIDIA cards since Ampere; exact elsewhere)")
    drawing.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of activations")
    drawing.add_argument("--device", default=None, help="cpu, cuda, mps ... (default: the fastest there is)")
    drawing.add_argument("--json", action="store_true", help="print settings and stage figures as JSON")

    command = commands.add_parser("generate", parents=[drawing], help="draw a prompt with a downloaded pack")
    command.add_argument("--pack", type=Path, required=True, help="folder of a downloaded repository")
    command.add_argument("--prompt", required=True)
    command.add_argument("--width", type=int, default=1024, help=f"pixels, a multiple of {SIZE_STEP}")
    command.add_argument("--height", type=int, default=1024, help=f"pixels, a multiple of {SIZE_STEP}")
    command.add_argument("--out", type=Path, default=Path("bonsai.png"))

    command = commands.add_parser("demo", parents=[drawing], help="build a miniature random pack and draw with it")
    command.add_argument("--width", type=int, default=256)
    command.add_argument("--height", type=int, default=256)
    command.add_argument("--out", type=Path, default=Path("bonsai-demo.png"))

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


def _device(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _table(result: Result) -> str:
    rows = [f"{'stage':<22}{'seconds':>9}{'MB in use':>11}"]
    rows += [f"{name:<22}{stage['seconds']:>9.2f}{stage['megabytes']:>11.0f}" for name, stage in result.stages.items()]
    rows.append(f"{'total':<22}{sum(stage['seconds'] for stage in result.stages.values()):>9.2f}")
    return "\n".join(rows)


def _draw(args: argparse.Namespace, pack: Path, prompt: str) -> None:
    device = _device(args.device)
    dtype = default_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype]
    backend = backends.select(args.backend, args.precision)
    result = generate(pack, prompt, device, dtype, backend, args.width, args.height, args.steps, args.seed,
                      progress=not args.json)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result.save(args.out)
    if args.json:
        print(json.dumps({"out": str(args.out), "settings": result.settings, "stages": result.stages}))
    else:
        print(f"\n{_table(result)}\n\n{args.out}: {args.width} x {args.height}, {result.settings['variant']}, "
              f"{result.settings['dtype']} on {device}")


def _demo(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pack = write_miniature(Path(folder) / "bonsai-miniature")
        _draw(args, pack, "a bonsai tree in a clay pot")
    if not args.json:
        print("The picture is noise: the miniature pack has random weights. It shows that every stage runs here.")


def _transformer_path(source: Path) -> Path:
    """The model that ``source`` is, or the one in the repository folder that it is."""
    if not source.is_dir():
        return source
    try:
        tensor_files(source)
    except PackError:
        return find_repository(source).transformer
    return source


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one sentence on stderr where the input cannot be used."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "generate":
            _draw(args, args.pack, args.prompt)
        elif args.command == "demo":
            _demo(args)
        elif args.command == "inspect":
            parts = inspect(args.path)
            print(json.dumps(parts, indent=2) if args.json else "\n".join(map(report, parts)))
        else:
            save_transformer(load_transformer(_transformer_path(args.source)), args.target, args.format, args.base3)
            print(args.target)
    except (PackError, ValueError) as error:
        print(f"bonsai-image: {error}", file=sys.stderr)
        return 2
    return 0
