"""The first pass: the dense model draws every prompt, and the latents of all levels are kept."""

import torch
from tqdm import tqdm

from .. import models
from .run import Run


@torch.inference_mode()
def draw(run: Run) -> None:
    """Write what is missing of the run's part: first all texts, so that their encoder is gone before the dense model
    comes. Raises ModelFileError."""
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
