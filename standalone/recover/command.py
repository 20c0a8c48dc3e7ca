"""The command ``recover``: from the options through both passes to the LoRA, and what it leaves
for the eye: the curves, and prompts held out by packed, recovered and dense weights."""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ... import __version__
from ...loaders import save_lora
from ...loaders.lora import RECOVERY
from .. import models
from ..batch.sheet import contact
from ..generate import compute_of, decode, save_png
from . import cost
from .run import Run
from .student import State, Student, as_lora

#: Pixels: a plot, and what is left free around it.
_WIDTH, _HEIGHT, _MARGIN = 900, 300, 40
_COLOURS = ("#1b6f4a", "#c2452d", "#2f5fb3", "#9a6b1f", "#6b3fa0", "#444444")
#: Prompts of the contact sheet, at most.
_SHOWN = 6


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
            store.write("text", shard, {str(number): run.encode(store.rows[number].prompt)
                                        for number in store.numbers(shard) if store.first(number) == number})
        del run.encoder
    if missing := store.missing("latents", part):
        transformer = models.transformer_module(run.dense(), *run.compute)
        for shard in tqdm(missing, "dense model", unit="file"):
            drawn: dict[str, torch.Tensor] = {}
            for numbers in torch.tensor(store.numbers(shard)).split(run.args.per_device_batch):
                rows = numbers.tolist()
                noise = run.sampler.noise([store.rows[row].seed for row in rows], run.packed.config.in_channels)
                levels = torch.stack([*run.sampler.trajectory(transformer, noise, run.texts(rows))], 1)
                # FP16: in BF16 the small steps between levels would drown in rounding.
                drawn.update(zip(map(str, rows), levels.half().cpu(), strict=True))
            store.write("latents", shard, drawn)


def _learn(run: Run) -> int:
    student, out = Student(run), run.args.out
    state = student.train()
    update, after = state.found()
    figures = {"update": update, "before": state.errors[0][1], "after": after}
    if update:
        about = {"variant": run.packed.variant, "base": run.packed.source, "bonsai-image": __version__}
        best = {name: factor.to(torch.bfloat16) for name, factor in state.best.items()}
        save_lora(as_lora(best, {RECOVERY: json.dumps(about | run.training | figures)}), out)
        save_png(_sheet(student, state), figures, out.with_name(f"{out.stem}-sheet.png"))
    save_png(_curves(state), figures, out.with_suffix(".png"))
    if run.args.json:
        print(json.dumps({"out": str(out) if update else None, **figures}))
    else:
        before, after = (" ".join(f"{error:.4f}" for error in figures[name]) for name in ("before", "after"))
        print(f"{out}: the error of prompts held out after each step is {after}, and {before} without (best: update "
              f"{update} of {run.args.updates})." if update else
              f"No LoRA was written: none brought prompts held out nearer to the dense model ({before} without).")
    return 0 if update else 1


def _curves(state: State) -> Image.Image:
    """The loss, smoothed, above the error of prompts held out after each step, relative to strength 0."""
    image = Image.new("RGB", (_WIDTH, 2 * _HEIGHT), "white")
    window = max(1, len(state.losses) // 50)
    smooth = [(i + window, sum(state.losses[i:i + window]) / window) for i in range(len(state.losses) - window + 1)]
    _plot(image, 0, f"loss, {len(state.losses)} updates", [smooth])
    steps = [[(update, errors[i] / first) for update, errors in state.errors]
             for i, first in enumerate(state.errors[0][1])]
    _plot(image, _HEIGHT, f"error of prompts held out after steps 1 to {len(steps)}, 1 without the LoRA", steps)
    return image


def _plot(image: Image.Image, top: int, title: str, lines: Sequence[list[tuple[int, float]]]) -> None:
    pen, bottom = ImageDraw.Draw(image), top + _HEIGHT - _MARGIN
    high, last = (max(point[i] for line in lines for point in line) or 1 for i in (1, 0))
    pen.line([(_MARGIN, top + _MARGIN), (_MARGIN, bottom), (_WIDTH - _MARGIN, bottom)], fill="#999999")
    pen.text((_MARGIN, top + 12), f"{title}, up to {high:.4g}", "black", ImageFont.load_default(13))
    for i, line in enumerate(lines):
        pen.line([(_MARGIN + (_WIDTH - 2 * _MARGIN) * x / last, bottom - (_HEIGHT - 2 * _MARGIN) * y / high)
                  for x, y in line], fill=_COLOURS[i % len(_COLOURS)], width=2)


@torch.inference_mode()
def _sheet(student: Student, state: State) -> Image.Image:
    """Prompts held out, spread over all of them, in one row of images a model."""
    run, device = student.run, student.device
    numbers = run.held_out[::-(-len(run.held_out) // _SHOWN)]
    dense = torch.stack([run.store.latents(number) for number in numbers], 1).to(device)

    def drawn() -> torch.Tensor:
        return torch.cat([[*run.sampler.trajectory(student.transformer, dense[0, i:i + 1], run.texts([number]))][-1]
                          for i, number in enumerate(numbers)])

    ends = {"packed": drawn()}
    with student.recovered(state.best):
        ends["recovered"] = drawn()
    vae, processor = models.vae_module(run.repository.vae, *run.compute[:2]), VaeImageProcessor()
    prompts = [run.store.rows[number].prompt for number in numbers]
    images = ((image, f"{name}: {prompt}") for name, latents in (ends | {"dense": dense[-1]}).items()
              for image, prompt in zip(decode(vae, processor, run.sampler.pictured(latents, vae)), prompts,
                                       strict=True))
    return contact(images, 3, len(numbers))
