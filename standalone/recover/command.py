"""The command ``recover``: from the options to the LoRA, and what it says of it."""

import argparse
import json
import sys

import torch

from ... import __version__
from ...loaders import save_lora
from ...loaders.lora import RECOVERY
from ..generate import compute_of, save_png
from . import branch, cost, report, teacher
from .run import Run
from .student import Student


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where no LoRA was better than none; 130 where a signal ended the run. Raises ModelFileError,
    ValueError and OSError."""
    compute = compute_of(args)
    if compute.setting.backend == "mlx" or (compute.device.type, compute.setting.backend) == ("mps", "auto"):
        raise ValueError("recover trains in PyTorch, not in MLX; give --backend torch")
    try:
        this = Run(args, compute)
        cost.announce(this)
        teacher.draw(this)
        return 0 if args.shards else _learn(this)
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130


def _learn(run: Run) -> int:
    student, out = Student(run), run.args.out
    state = student.train()
    update, after = state.found()
    figures = {"update": update, "before": state.errors[0][1], "after": after}
    if update:
        about = {"variant": run.packed.variant, "base": run.packed.source, "bonsai-image": __version__}
        best = {name: factor.to(torch.bfloat16) for name, factor in state.best.items()}
        save_lora(branch.lora(best, {RECOVERY: json.dumps(about | run.training | figures)}), out)
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
