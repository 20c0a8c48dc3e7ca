"""What a run leaves for the eye: the curves, and prompts held out by packed, recovered and dense weights."""

from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from .. import models
from ..batch.sheet import contact
from ..generate import decode
from .student import State, Student

#: Pixels: a plot, and what is left free around it.
_WIDTH, _HEIGHT, _MARGIN = 900, 300, 40
_COLOURS = ("#1b6f4a", "#c2452d", "#2f5fb3", "#9a6b1f", "#6b3fa0", "#444444")
#: Prompts of the contact sheet, at most.
_SHOWN = 6

Line = list[tuple[int, float]]


def curves(state: State) -> Image.Image:
    """The loss, smoothed, above the error of prompts held out after each step, relative to strength 0."""
    image = Image.new("RGB", (_WIDTH, 2 * _HEIGHT), "white")
    window = max(1, len(state.losses) // 50)
    smooth = [(i + window, sum(state.losses[i:i + window]) / window) for i in range(len(state.losses) - window + 1)]
    _plot(image, 0, f"loss, {len(state.losses)} updates", [smooth])
    steps = [[(update, errors[i] / first) for update, errors in state.errors]
             for i, first in enumerate(state.errors[0][1])]
    _plot(image, _HEIGHT, f"error of prompts held out after steps 1 to {len(steps)}, 1 without the LoRA", steps)
    return image


def _plot(image: Image.Image, top: int, title: str, lines: Sequence[Line]) -> None:
    pen, bottom = ImageDraw.Draw(image), top + _HEIGHT - _MARGIN
    high, last = (max(point[i] for line in lines for point in line) or 1 for i in (1, 0))
    pen.line([(_MARGIN, top + _MARGIN), (_MARGIN, bottom), (_WIDTH - _MARGIN, bottom)], fill="#999999")
    pen.text((_MARGIN, top + 12), f"{title}, up to {high:.4g}", "black", ImageFont.load_default(13))
    for i, line in enumerate(lines):
        pen.line([(_MARGIN + (_WIDTH - 2 * _MARGIN) * x / last, bottom - (_HEIGHT - 2 * _MARGIN) * y / high)
                  for x, y in line], fill=_COLOURS[i % len(_COLOURS)], width=2)


@torch.inference_mode()
def sheet(student: Student, state: State) -> Image.Image:
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
