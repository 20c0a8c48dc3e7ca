"""What the dense model drew, on disk: numbered safetensors files of texts and latents, and a manifest that says of
what."""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ...disk import write_whole
from ...loaders import ModelFileError
from ...loaders.errors import refusing
from ...loaders.files import read_json
from ..batch.rows import Row

#: Rows in a file.
_SHARD = 32
#: Files kept open, mapped, at once.
_opened = lru_cache(64)(safe_open)


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

    def prompts(self, shard: int) -> dict[str, list[int]]:
        """Prompt -> the numbers of its rows, in one file."""
        return {prompt: list(group) for prompt, group in groupby(self.numbers(shard), lambda i: self.rows[i].prompt)}

    def missing(self, kind: str, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Which files of a kind are not there, of one part of them."""
        shards = range(part[0] - 1, -(-len(self.rows) // _SHARD), part[1])
        return [shard for shard in shards if not self._path(kind, shard).exists()]

    def write(self, kind: str, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        """Raises ModelFileError."""
        write(self._path(kind, shard), save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))

    def text(self, number: int) -> torch.Tensor:
        """The embeddings (tokens, channels) of a row's prompt."""
        first = self.prompts(number // _SHARD)[self.rows[number].prompt][0]
        return _opened(self._path("text", number // _SHARD), "pt").get_tensor(str(first))

    def latents(self, number: int, levels: slice = slice(None)) -> torch.Tensor:
        """The latents (levels, tokens, channels) of a row, in FP32."""
        return _opened(self._path("latents", number // _SHARD), "pt").get_slice(str(number))[levels].float()

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / f"{kind}-{shard + 1:05}.safetensors"
