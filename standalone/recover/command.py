"""The command ``recover``: from the options through both passes to the LoRA, and what it says of it."""

import argparse
import json
import sys

import torch
from tqdm import tqdm

from ... import __version__
from ...loaders import save_lora
from ...loaders.lora import RECOVERY
from .. import models
from ..generate import compute_of, save_png
from . import cost, report
from .run import Run
from .student import Student, as_lora


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where no LoRA was better than none; 130 where a signal ended the run. Raises ModelFileError,
    ValueError and OSError."""
    compute = compute_of(args)
    if compute.setting.backend == "mlx" or (compute.device.type, compute.setting.backend) == ("mps", "auto"):
        raise ValueError("recover trains in PyTorch, not in MLX; give --backend torch")
    try:
        this = Run(args, compute)
        cost.announce(this)
        _draw(this)
        return 0 if args.shards else _learn(this)
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130


@torch.inference_mode()
def _draw(run: Run) -> None:
    """The first pass: the dense model draws what is missing of the run's part, and the latents of all levels are kept.
    First all texts, so that their encoder is gone before the dense model comes. Raises ModelFileError."""
    store, part = run.store, run.args.shards or (1, 1)
    store.claim(run.facts)
    if not run.args.encode_again and (missing := store.missing("text", part)):
        for shard in tqdm(missing, "text", unit="file"):
            store.write("text", shard, {str(numbers[0]): run.encode(prompt)
                                        for prompt, numbers in store.prompts(shard).items()})
        del run.encoder
    if missing := store.missing("latents", part):
        transformer = models.transformer_module(run.dense(), *run.compute)
        for shard in tqdm(missing, "dense model", unit="file"):
            store.write("latents", shard, _latents(run, transformer, store.numbers(shard)))


def _latents(run: Run, transformer: torch.nn.Module, numbers: range) -> dict[str, torch.Tensor]:
    """Latents (levels, tokens, channels) by row number. FP16: in BF16 the small steps between levels would drown in
    rounding."""
    drawn = {}
    for i in range(0, len(numbers), run.args.per_device_batch):
        part = numbers[i:i + run.args.per_device_batch]
        noise = run.sampler.noise([run.store.rows[number].seed for number in part], run.packed.config.in_channels)
        levels = torch.stack([*run.sampler.trajectory(transformer, noise, run.texts(part))], 1).half().cpu()
        drawn.update({str(number): each for number, each in zip(part, levels, strict=True)})
    return drawn


def _learn(run: Run) -> int:
    student, out = Student(run), run.args.out
    state = student.train()
    update, after = state.found()
    figures = {"update": update, "before": state.errors[0][1], "after": after}
    if update:
        about = {"variant": run.packed.variant, "base": run.packed.source, "bonsai-image": __version__}
        best = {name: factor.to(torch.bfloat16) for name, factor in state.best.items()}
        save_lora(as_lora(best, {RECOVERY: json.dumps(about | run.training | figures)}), out)
        save_png(report.sheet(student, state), figures, out.with_name(f"{out.stem}-sheet.png"))
    save_png(report.curves(state), figures, out.with_suffix(".png"))
    if run.args.json:
        print(json.dumps({"out": str(out) if update else None, **figures}))
    else:
        before, after = (" ".join(f"{error:.4f}" for error in figures[name]) for name in ("before", "after"))
        print(f"{out}: the error of prompts held out after each step is {after}, and {before} without (best: update "
              f"{update} of {run.args.updates})." if update else
              f"No LoRA was written: none brought prompts held out nearer to the dense model ({before} without).")
    return 0 if update else 1
