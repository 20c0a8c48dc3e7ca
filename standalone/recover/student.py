"""The second pass: low-rank factors beside the packed weights learn the steps of the dense model."""

import io
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ...loaders import Lora
from ...loaders.errors import refusing
from ...loaders.klein import KleinConfig, comfyui_shapes, layers
from ...loaders.lora_names import Target
from ...ops.packed import is_packed
from .. import lora, models
from .run import Run, write

#: Tensors by ``<ComfyUI's layer>.lora_down.weight`` (rank, in) and ``<ComfyUI's layer>.lora_up.weight`` (out, rank).
Factors = Mapping[str, torch.Tensor]
_DOWN, _UP = ".lora_down.weight", ".lora_up.weight"
#: Updates of the warm-up, the part of all in which the learning rate falls, how often a run measures prompts held out.
_WARM_UP, _DECAY, _CHECKS = 20, 0.6, 12
#: Rows that the variance of the channels is taken from, at most.
_SAMPLE = 2048


def new_factors(transformer: torch.nn.Module, config: KleinConfig, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors in FP32 for every packed linear of diffusers' ``transformer``, which change nothing yet: the upper ones
    are zero."""
    chance, shapes, factors = torch.Generator().manual_seed(seed), comfyui_shapes(config), {}
    for name, (sources, _) in layers(config.num_layers, config.num_single_layers).items():
        if is_packed(transformer.get_parameter(sources[0])):
            rows, columns = shapes[name]
            layer = name.removesuffix(".weight")
            factors[f"{layer}{_DOWN}"] = torch.randn(rank, columns, generator=chance) * columns**-0.5
            factors[f"{layer}{_UP}"] = torch.zeros(rows, rank)
    return factors


def as_lora(factors: Factors, metadata: Mapping[str, str] | None = None) -> Lora:
    """``factors``, which are not copied, as a LoRA of alpha equal to its rank."""
    found = Lora(Path("recovery"), dict(metadata or {}))
    for name, up in factors.items():
        if name.endswith(_UP):
            layer = name.removesuffix(_UP)
            found.groups[Target(f"diffusion_model.{layer}", layer)] = {
                "lora_down.weight": factors[f"{layer}{_DOWN}"], "lora_up.weight": up,
                "alpha": torch.tensor(float(up.shape[1]))}
    return found


@dataclass
class State:
    """Where training is. ``errors``: (update, error after each step); those of update 0 are of strength 0."""

    factors: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    errors: list[tuple[int, list[float]]] = field(default_factory=list)

    def found(self) -> tuple[int, list[float]]:
        """The update with the least error in finished images, and its errors."""
        return min(self.errors, key=lambda known: known[1][-1])


class Student:
    """The packed model with the latents to learn from."""

    def __init__(self, run: Run):
        self.run, self.args, self.sampler, self.device = run, run.args, run.sampler, run.compute.device
        self.transformer = models.transformer_module(run.packed, *run.compute)
        self.transformer.enable_gradient_checkpointing()
        # A channel that the VAE hardly uses is noise to the end; unweighted, it would be learned like the others.
        ends = torch.stack([run.store.latents(number, slice(-1, None))[0] for number in run.trained[:_SAMPLE]])
        self.weight = (ends.var((0, 1)) / ends.var((0, 1)).sum()).to(self.device)

    def loss(self, numbers: list[int], levels: torch.Tensor) -> torch.Tensor:
        """The error of the velocity from each level to the next, every channel weighted by its variance in finished
        images."""
        pairs = torch.stack([self.run.store.latents(number, slice(level, level + 2))
                             for number, level in zip(numbers, levels.tolist(), strict=True)]).to(self.device)
        levels = levels.to(self.device)
        wanted = (pairs[:, 1] - pairs[:, 0]) / self.sampler.sigmas.diff()[levels, None, None]
        found = self.sampler.velocity(self.transformer, pairs[:, 0], levels, self.run.texts(numbers))
        return ((found - wanted).square() @ self.weight).mean()

    @torch.no_grad()
    def error(self) -> list[float]:
        """How far prompts held out are from the dense model's latents after each step from the same noise, weighted
        as in :meth:`loss`."""
        errors = []
        for part in torch.tensor(self.run.held_out).split(self.args.per_device_batch):
            wanted = torch.stack([self.run.store.latents(number) for number in part.tolist()], 1).to(self.device)
            steps = self.sampler.trajectory(self.transformer, wanted[0], self.run.texts(part.tolist()))
            errors.append(((torch.stack([*steps]) - wanted)[1:].square() @ self.weight).mean(2))
        return torch.cat(errors, 1).mean(1).tolist()

    def recovered(self, factors: Factors) -> AbstractContextManager[None]:
        """The model has the LoRA of these factors."""
        return lora.applied(lora.hooks(self.transformer, [(as_lora(factors), 1.0)]))

    def train(self) -> State:
        """Train from the state on disk, or from nothing, to the end.

        What an update draws follows from the seed and its number alone, so a continued run is the unbroken one. Raises
        ModelFileError, and KeyboardInterrupt where a signal ended it before.
        """
        start = new_factors(self.transformer, self.run.packed.config, self.args.rank, self.args.seed)
        state = State({name: torch.nn.Parameter(each.to(self.device)) for name, each in start.items()}, start)
        optimizer = torch.optim.AdamW(state.factors.values(), self.args.learning_rate, weight_decay=0.0)
        if (path := self.run.state).exists():
            _restore(path, state, optimizer)
        updates, saved = self.args.updates, time.monotonic()
        with (self.recovered(state.factors), _signalled() as stopped,
              tqdm(total=updates, initial=len(state.losses), desc="LoRA", unit="update") as bar):
            while len(state.losses) < updates and not stopped:
                if not state.errors:
                    self._check(state)
                state.losses.append(self._update(len(state.losses), state, optimizer))
                done = len(state.losses)
                if done == updates or done % max(1, updates // _CHECKS) == 0:
                    self._check(state)
                bar.update()
                bar.set_postfix(loss=f"{state.losses[-1]:.4f}", error=f"{state.errors[-1][1][-1]:.4f}",
                                without=f"{state.errors[0][1][-1]:.4f}")
                if stopped or done == updates or time.monotonic() - saved > 60 * self.args.save_minutes:
                    _save(path, state, optimizer)
                    saved = time.monotonic()
        if len(state.losses) < updates:
            raise KeyboardInterrupt
        return state

    def _update(self, number: int, state: State, optimizer: torch.optim.Optimizer) -> float:
        args, trained = self.args, self.run.trained
        chance = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
        drawn = torch.randint(len(trained), (args.batch,), generator=chance)
        levels = torch.randint(args.steps, (args.batch,), generator=chance)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(
            1.0, (number + 1) / _WARM_UP, (args.updates - number) / (_DECAY * args.updates))
        optimizer.zero_grad()
        total = 0.0
        for part in torch.arange(args.batch).split(args.per_device_batch):
            loss = self.loss([trained[i] for i in drawn[part].tolist()], levels[part]) * len(part) / args.batch
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    def _check(self, state: State) -> None:
        state.errors.append((len(state.losses), self.error()))
        if state.found() is state.errors[-1]:
            state.best = {name: factor.detach().cpu().clone() for name, factor in state.factors.items()}


@contextmanager
def _signalled() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of ending at them, so that an update is finished or not begun."""
    caught: list[int] = []
    with ExitStack() as before:
        for number in (signal.SIGINT, signal.SIGTERM):
            before.callback(signal.signal, number, signal.signal(number, lambda signum, _frame: caught.append(signum)))
        yield caught


def _save(path: Path, state: State, optimizer: torch.optim.Optimizer) -> None:
    stream = io.BytesIO()
    torch.save(vars(state) | {"optimizer": optimizer.state_dict()}, stream)
    write(path, stream.getvalue())


def _restore(path: Path, state: State, optimizer: torch.optim.Optimizer) -> None:
    # PyTorch raises whatever it comes across in a damaged file, or in one that holds something else.
    with refusing(path, "the state of a training", "remove it to train from the beginning", Exception):
        known = torch.load(path, "cpu", weights_only=True)
        optimizer.load_state_dict(known["optimizer"])
        for name, factor in state.factors.items():
            factor.data.copy_(known["factors"][name])
        state.best, state.losses, state.errors = known["best"], known["losses"], known["errors"]
