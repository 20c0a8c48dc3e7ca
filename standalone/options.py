"""The options of every command, and the types of their values."""

import argparse
import math
import os
from contextlib import suppress
from pathlib import Path

from .. import __version__, loaders
from ..loaders.lora import COMFY_LORA
from ..ops import backends
from ..ops.devices import DTYPES


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


def parser() -> argparse.ArgumentParser:
    """The parser of the program."""
    program = argparse.ArgumentParser(prog="bonsai-image", description="Bonsai Image 4B on packed weights, headless.")
    program.add_argument("--version", action="version", version=__version__)
    commands = program.add_subparsers(dest="command", required=True)

    output, sampling, model = _output_options(), sampling_options(), _model_options(1024)

    command = commands.add_parser("generate", parents=[sampling, model], help="make an image from a prompt")
    command.add_argument("--prompt", required=True)
    command.add_argument("--image", type=Path, action="append", default=[], help="an image to edit (repeatable)")
    command.add_argument("--lora", type=lora_option, action="append", default=[], metavar="PATH[:STRENGTH]",
                         help="a LoRA, at strength 1 unless said (repeatable)")
    command.add_argument("--out", type=png_path, default="bonsai.png", help="PNG file to write; replaced if it exists")

    _add_batch(commands, [sampling, model])
    _add_recover(commands, [sampling_options(), _model_options(512)])

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
    return program


def _add_batch(commands: argparse._SubParsersAction, shared: list[argparse.ArgumentParser]) -> None:
    """``batch``, with the options that it shares with ``generate``, and ``sheet``."""
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


def _add_recover(commands: argparse._SubParsersAction, shared: list[argparse.ArgumentParser]) -> None:
    """``recover``, with the options that it shares with ``generate``."""
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


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def shard(text: str) -> tuple[int, int]:
    """The type of an option ``I/N``."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError("must be I/N with I from 1 to N, such as 3/8")
    return int(number), int(count)
