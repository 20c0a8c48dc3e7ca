"""One run of ``recover``: what its options name, opened and checked before anything is computed, and the folder with
what the dense model drew."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ...disk import write_whole
from ...loaders import ModelFileError, Transformer, load_transformer
from ...loaders.errors import refusing
from ...loaders.files import read_json
from ...loaders.models import refuse_existing
from .. import models
from ..batch.rows import Row, digest, read
from ..generate import Compute, complete_repository, encode, text_pipeline
from .sampling import Sampler

#: Rows in a file.
_SHARD = 32
#: Files kept open, mapped, at once.
_opened = lru_cache(64)(safe_open)
_TEACHER = "give --teacher the dense FLUX.2 Klein 4B that the packed model was made from"


def write(path: Path, content: bytes) -> None:
    """A file, and the folder it lies in, that is there whole or not at all. Raises ModelFileError."""
    with refusing(path, "a disk that takes the file", "free some space, then run the same command again", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


@dataclass(frozen=True)
class Store:
    """``rows`` by number, those of one prompt next to each other, in a folder."""

    folder: Path
    rows: tuple[Row, ...]

    def claim(self, facts: dict[str, Any]) -> None:
        """Write what the latents depend on, or compare it with what the folder has. Raises ModelFileError."""
        path = self.folder / "manifest.json"
        if not (known := read_json(path)):
            write(path, json.dumps(facts, indent=2).encode())
        elif odd := [name for name in facts if known.get(name) != facts[name]]:
            raise ModelFileError(path, f"latents with {odd[0]} {facts[odd[0]]}", f"with {known.get(odd[0])}",
                                 "give another folder with --work, or remove this one")

    def numbers(self, shard: int) -> range:
        """The numbers of the rows in one file."""
        return range(shard * _SHARD, min((shard + 1) * _SHARD, len(self.rows)))

    def first(self, number: int) -> int:
        """The first row with the prompt of another, in one file."""
        return next(i for i in self.numbers(number // _SHARD) if self.rows[i].prompt == self.rows[number].prompt)

    def missing(self, kind: str, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Which files of a kind are not there, of one part of them."""
        shards = range(part[0] - 1, -(-len(self.rows) // _SHARD), part[1])
        return [shard for shard in shards if not self._path(kind, shard).exists()]

    def write(self, kind: str, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        """Raises ModelFileError."""
        write(self._path(kind, shard), save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))

    def text(self, number: int) -> torch.Tensor:
        """The embeddings (tokens, channels) of a row's prompt."""
        return _opened(self._path("text", number // _SHARD), "pt").get_tensor(str(self.first(number)))

    def latents(self, number: int, levels: slice = slice(None)) -> torch.Tensor:
        """The latents (levels, tokens, channels) of a row, in FP32."""
        return _opened(self._path("latents", number // _SHARD), "pt").get_slice(str(number))[levels].float()

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / f"{kind}-{shard + 1:05}.safetensors"


def _rows(path: Path, defaults: Row) -> tuple[Row, ...]:
    """The rows of a prompt file, those of one prompt next to each other; each starts from noise of its own."""
    found = []
    for number, row in enumerate(read(path, defaults)):
        if isinstance(row, ValueError):
            raise row
        if row.task_key() != defaults.task_key():
            raise ValueError(f"row {number + 1} of {path.name}: recover draws all rows at one size, without reference "
                             "and LoRA; leave out all columns but prompt, seed and id")
        found.append(replace(row, seed=row.seed + number))
    return tuple(sorted(found, key=lambda row: (row.prompt, row.seed)))


def _held_out(found: Sequence[Row], count: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows to train on, and of one row each of ``count`` prompts that training never sees."""
    prompts = list(dict.fromkeys(row.prompt for row in found))
    if len(prompts) < 2 * count:
        raise ValueError(f"{len(prompts)} different prompts are too few to hold {count} out; give more, or a smaller "
                         "--held-out")
    held = {prompts[i * len(prompts) // count] for i in range(count)}
    measured = {row.prompt: number for number, row in enumerate(found) if row.prompt in held}
    return [number for number, row in enumerate(found) if row.prompt not in held], list(measured.values())


class Run:
    """Raises ModelFileError and ValueError for what cannot be used."""

    def __init__(self, args: argparse.Namespace, compute: Compute):
        if args.out.suffix != ".safetensors":
            raise ValueError(f"--out {args.out} must end in .safetensors")
        refuse_existing(args.out)
        self.args, self.compute = args, compute
        self.repository = complete_repository(args.checkpoint, args.transformer)
        self.packed = load_transformer(self.repository.transformer)
        defaults = Row("", 0, args.width, args.height, args.steps)  # --seed is that of training
        self.store = Store(args.work or args.out.with_name(f"{args.out.stem}-work"), _rows(args.prompts, defaults))
        self.trained, self.held_out = _held_out(self.store.rows, args.held_out)
        self.sampler = Sampler(models.scheduler(self.repository.scheduler), args.width, args.height, args.steps,
                               compute.device)
        drawn = json.dumps([[row.prompt, row.seed] for row in self.store.rows]).encode()
        #: What the dense model's latents depend on.
        self.facts: dict[str, Any] = {
            "teacher": digest(self.dense().path), "text encoder": digest(self.repository.text_encoder),
            "prompts": hashlib.sha256(drawn).hexdigest(), "width": args.width, "height": args.height,
            "steps": args.steps, "dtype": str(compute.dtype).removeprefix("torch.")}
        #: What training depends on, and the file of its state, so that other options begin another.
        self.training = self.facts | {"student": digest(self.packed.path)} | {
            name: getattr(args, name) for name in ("precision", "rank", "updates", "batch", "learning_rate", "held_out",
                                                   "seed")}
        name = hashlib.sha256(json.dumps(self.training).encode()).hexdigest()[:8]
        self.state = self.store.folder / f"state-{name}.pt"

    def dense(self) -> Transformer:
        """The dense model. Raises ModelFileError unless it has the architecture of the packed one."""
        try:
            model = load_transformer(self.args.teacher, dense=True)
        except ModelFileError as error:
            raise ModelFileError(error.path, error.expected, error.found, _TEACHER) from error
        ours, theirs = asdict(self.packed.config), asdict(model.config)
        if odd := [name for name in ours if ours[name] != theirs[name]]:
            wanted, found = (", ".join(f"{name} {config[name]}" for name in odd) for config in (ours, theirs))
            raise ModelFileError(model.path, f"{wanted}, as the packed model has", found, _TEACHER)
        return model

    @cached_property
    def encoder(self) -> Any:
        """A pipeline with the text encoder, loaded when first used."""
        return text_pipeline(self.repository, self.compute)

    def encode(self, prompt: str) -> torch.Tensor:
        """The embeddings (tokens, channels) of a prompt."""
        return encode(self.encoder, [prompt], self.compute)[0]

    def texts(self, numbers: Sequence[int]) -> torch.Tensor:
        """The embeddings (rows, tokens, channels) of the prompts of rows."""
        found = [self.encode(self.store.rows[number].prompt) if self.args.encode_again else self.store.text(number)
                 for number in numbers]
        if len({len(text) for text in found}) > 1:
            raise ValueError("a long prompt has more tokens than the others; give --per-device-batch 1")
        return torch.stack(found).to(self.compute.device)
