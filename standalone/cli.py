"""The command line: generate, batch, sheet, recover, inspect, convert, doctor."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .. import loaders
from ..disk import advice, reason
from ..loaders.lora import COMFY_LORA
from ..ops.backends import selfcheck
from . import broken_import, describe, doctor, options


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


def _of(module: str) -> Callable[[argparse.Namespace], int | None]:
    """The command ``run`` of a module, imported only then: it needs libraries that other commands do without."""
    return lambda args: importlib.import_module(module, __package__).run(args)


_COMMANDS = {"generate": _generate, "batch": _of(".batch.command"), "sheet": _of(".batch.sheet"),
             "recover": _of(".recover.command"), "inspect": _inspect, "convert": _convert, "doctor": _doctor}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status (see :func:`run`)."""
    args = options.parser().parse_args(argv)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault(selfcheck.FILE, os.path.join(cache, "bonsai-image", "times.json"))
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
