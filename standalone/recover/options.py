"""The options of ``recover``. Imports nothing heavy: every command of the program reads this file."""

import argparse
from pathlib import Path

from ..batch.options import positive, shard


def add_parser(commands: argparse._SubParsersAction, shared: list[argparse.ArgumentParser]) -> None:
    """Add ``recover``, with the options that it shares with ``generate``."""
    command = commands.add_parser("recover", parents=shared, help="train a LoRA that wins back what the bits cost",
                                  description="First the dense model draws the prompts, then a LoRA beside the packed "
                                              "weights learns to draw the same. An interrupted run continues with the "
                                              "same command. Exit status 1: no LoRA better than none was found.")
    command.add_argument("--teacher", type=Path, required=True, help="the dense FLUX.2 Klein 4B: a diffusers folder or "
                                                                     "ComfyUI's BF16 file")
    command.add_argument("--prompts", type=Path, required=True, help=".txt, .jsonl, .csv or .parquet, as for batch")
    command.add_argument("--out", type=Path, required=True, help="the LoRA to write, a new .safetensors file")
    command.add_argument("--work", type=Path, help="folder of the dense model's latents and the state of training "
                                                   "(default: beside --out)")
    command.add_argument("--rank", type=positive, default=32)
    command.add_argument("--updates", type=positive, default=3000, help="optimizer steps")
    command.add_argument("--batch", type=positive, default=4, help="images an update")
    command.add_argument("--per-device-batch", type=positive, default=1, help="images computed at once")
    command.add_argument("--learning-rate", type=float, default=1e-4)
    command.add_argument("--held-out", type=positive, default=32, help="prompts that are measured, never trained on")
    command.add_argument("--save-minutes", type=float, default=10.0, help="how often the state of training is kept")
    command.add_argument("--encode-again", action="store_true",
                         help="keep no text embeddings on disk: six times less of it, 1.8 GB more GPU memory")
    command.add_argument("--shards", type=shard, metavar="I/N",
                         help="draw only part I of N of the dense model's latents in this process, and do not train")
