"""The options of ``batch`` and ``sheet``. Imports nothing heavy: every command of the program reads this file."""

import argparse
from pathlib import Path


def add_parsers(commands: argparse._SubParsersAction, shared: list[argparse.ArgumentParser]) -> None:
    """Add ``batch``, with the options that it shares with ``generate``, and ``sheet``."""
    command = commands.add_parser("batch", parents=shared, help="make many images, on one machine or a Ray cluster",
                                  description="An interrupted run continues with the same command. Exit status 1: some "
                                              "rows failed. Size, steps and seed are those of rows without their own.")
    command.add_argument("prompts", type=Path, nargs="?", help=".txt, .csv, .json or .parquet; see docs/batch.md")
    command.add_argument("--out", type=Path, required=True, help="folder for the images and their manifest")
    command.add_argument("--seeds", type=positive, default=1, help="images per row, from its seed on")
    command.add_argument("--workflow", type=Path, help="a workflow from ComfyUI (saved or exported as API) whose "
                                                       "prompt, size, steps, seed and LoRA are the defaults")
    command.add_argument("--set", action="append", default=[], metavar="COLUMN=VALUE",
                         help="a default for all rows, over the workflow's (repeatable)")
    command.add_argument("--address", help="a Ray cluster: auto, or ray://HOST:PORT (default: start Ray here)")
    command.add_argument("--devices", type=positive, help="workers that denoise (default: one per GPU, or 1)")
    command.add_argument("--encoders", type=positive, default=1, help="workers that encode prompts")
    command.add_argument("--per-device-batch", type=positive, default=1, help="images denoised at once")
    command.add_argument("--rows-per-task", type=positive, help="rows that move together (default: one batch)")
    command.add_argument("--threads", type=positive, help="CPU threads per worker (default: all, shared)")
    command.add_argument("--shards", type=shard, metavar="I/N", help="without Ray: every Nth image in this process")

    command = commands.add_parser("sheet", help="make a contact sheet and a page of a batch's images")
    command.add_argument("folder", type=Path, help="the folder given to batch as --out")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError("must be I/N with I from 1 to N, such as 3/8")
    return int(number), int(count)
