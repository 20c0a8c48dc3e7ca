"""The command line: generate, batch, sheet, recover, inspect, convert, doctor."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .. import __version__, loaders
from ..disk import advice, reason
from ..loaders.lora import COMFY_LORA
from ..ops import backends
from ..ops.devices import DTYPES
from . import broken_import, describe, doctor
from .batch import options
from .recover import options as recovery


def _output_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print settings and figures as JSON")
    return parser


def sampling_options() -> argparse.ArgumentParser:
    """The options that all commands share that make images, as a parent of their parsers."""
    parser = argparse.ArgumentParser(add_help=False, parents=[_output_options()])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=backends.NAMES, default="auto", help="what multiplies packed weights")
    parser.add_argument("--precision", choices=backends.PRECISIONS, default="auto", help=(
        "auto: as near as BF16 by what is fastest here (default); exact: to the rounding of the dtype; fast: int8"))
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the activations")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps ... (default: the fastest available)")
    return parser


def _model_options(side: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help=(
        "folder of a downloaded repository, or a checkpoint file"))
    parser.add_argument("--transformer", type=Path, help="a diffusion model, used instead of the checkpoint's own")
    parser.add_argument("--vae", type=Path, help="a VAE, used instead of the checkpoint's own, such as FLUX.2's small "
                                                 "decoder")
    parser.add_argument("--width", type=int, default=side, help="pixels, a multiple of 16")
    parser.add_argument("--height", type=int, default=side, help="pixels, a multiple of 16")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bonsai-image", description="Bonsai Image 4B on packed weights, headless.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    output, sampling, model = _output_options(), sampling_options(), _model_options(1024)

    command = commands.add_parser("generate", parents=[sampling, model], help="make an image from a prompt")
    command.add_argument("--prompt", required=True)
    command.add_argument("--image", type=Path, action="append", default=[], help="an image to edit (repeatable)")
    command.add_argument("--lora", type=lora_option, action="append", default=[], metavar="PATH[:STRENGTH]",
                         help="a LoRA, at strength 1 unless said (repeatable)")
    command.add_argument("--out", type=png_path, default="bonsai.png", help="PNG file to write; replaced if it exists")

    options.add_parsers(commands, [sampling, model])

    recovery.add_parser(commands, [sampling_options(), _model_options(512)])

    command = commands.add_parser("inspect", parents=[output], help="describe a file, folder or repository")
    command.add_argument("path", type=Path)
    command.add_argument("--verify", action="store_true", help="read every byte: compare hashes, check codes")

    command = commands.add_parser("convert", help="convert a diffusion model or a LoRA without loss")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--to", choices=(*loaders.targets(), "checkpoint", COMFY_LORA), required=True, help=(
        "comfy-base3: comfy with five weights a byte; checkpoint: a whole repository in one file; comfy-lora: a LoRA"))

    command = commands.add_parser("doctor", parents=[output],
                                  help="versions, devices, backends and models, for a bug report")
    command.add_argument("--measure", action="store_true", help="time the products of a step, in about a minute")

    # Listed for --help; __main__ runs it without importing this module, which imports torch.
    commands.add_parser("download", help="download a repository from the Hugging Face Hub", add_help=False)
    return parser


def png_path(text: str) -> Path:
    """The type of an option that names a PNG file: fails before rendering if it cannot be written."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} must end in .png and must not be a folder")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written, because {folder} is not a writable folder")
    return path


def lora_option(text: str) -> tuple[Path, float]:
    """The type of an option that names a LoRA: a path, which may itself have colons, and its strength."""
    path, _, end = text.rpartition(":")
    strength = None
    with suppress(ValueError):
        strength = float(end)
    if strength is None or not path or os.path.isfile(text):
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{end} is no strength; give a number, such as 0.8")
    return Path(path), strength


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Seconds and megabytes of every stage, a column for each result."""
    stages = list(results.values())
    rows = [f"{'stage':<22}" + "".join(f"{name:>22}" for name in results)]
    rows += [f"{name:<22}" + "".join(f"{each[name]['seconds']:>9.2f} s{each[name]['megabytes']:>8.0f} MB"
                                     for each in stages) for name in stages[0]]
    totals = (sum(stage["seconds"] for stage in each.values()) for each in stages)
    return "\n".join([*rows, (f"{'total':<22}" + "".join(f"{total:>9.2f} s{'':>11}" for total in totals)).rstrip()])


def _generate(args: argparse.Namespace) -> None:
    from .generate import complete_repository, compute_of, generate, save_png
    from .references import open_image

    compute, repository = compute_of(args), complete_repository(args.checkpoint, args.transformer, args.vae)
    images, settings, stages = generate(repository, [args.prompt], compute, args.width, args.height, args.steps,
                                        args.seed, [open_image(path) for path in args.image], progress=not args.json,
                                        loras=[(loaders.load_lora(path), strength) for path, strength in args.lora])
    save_png(images[0], settings, args.out)
    print(json.dumps({"out": str(args.out), "settings": settings, "stages": stages}) if args.json else
          f"\n{table({args.out.name: stages})}\n\n{args.out}: {args.width} x {args.height}, "
          f"{settings['variant']}, {settings['dtype']} on {compute.device}")


def _batch(args: argparse.Namespace) -> int:
    from .batch import command

    return command.run(args)


def _sheet(args: argparse.Namespace) -> None:
    from .batch import sheet

    print(*sheet.write(args.folder), sep="\n")


def _recover(args: argparse.Namespace) -> int:
    from .recover import command

    return command.run(args)


def _inspect(args: argparse.Namespace) -> None:
    parts = describe.describe(args.path, args.verify)
    print(json.dumps(parts, indent=2) if args.json else "\n".join(map(describe.report, parts)))


def _convert(args: argparse.Namespace) -> None:
    if args.to == COMFY_LORA:
        loaders.save_lora(loaders.load_lora(args.source), args.target)
    elif args.to == "checkpoint" or (args.to == "mlx" and loaders.is_whole(args.source)):
        loaders.save_repository(loaders.find_repository(args.source), args.target, args.to)
    else:
        loaders.save_transformer(loaders.load_transformer(args.source), args.target, args.to)
    print(args.target)


def _doctor(args: argparse.Namespace) -> None:
    found = doctor.diagnose(Path(__file__).absolute().parents[1], args.measure)
    print(json.dumps(found, indent=2) if args.json else doctor.report(found))


_COMMANDS = {"generate": _generate, "batch": _batch, "sheet": _sheet, "recover": _recover,
             "inspect": _inspect, "convert": _convert, "doctor": _doctor}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status (see :func:`run`)."""
    args = _parser().parse_args(argv)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault(backends.selfcheck.FILE, os.path.join(cache, "bonsai-image", "times.json"))
    return run(_COMMANDS[args.command], args)


def run(command: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run ``command(args)``. Returns 0 on success, 1 if some images of a batch failed, and 2 after printing one
    sentence to stderr if the input is unusable."""
    try:
        return command(args) or 0
    except (loaders.ModelFileError, ValueError, OSError, MemoryError) as error:
        if broken_import(error):
            raise
        said = str(error) if isinstance(error, (loaders.ModelFileError, ValueError)) else (
            f"{reason(error)}; {advice(error)} and run the same command again.")
        print(f"bonsai-image: {said}", file=sys.stderr)
        return 2
