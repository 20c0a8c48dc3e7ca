"""The node that shows what a MODEL is made of."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..loaders import ModelFileError
from ..loaders.description import count, publication
from ..loaders.names import is_packable
from ..loaders.opening import tensor_files
from ..ops import backends
from ..ops.packed import is_packed
from .load import CATEGORY
from .models import ATTACHMENT, MLX_ATTACHMENT, Origin


def describe(patcher) -> str:
    """Variant, source, compute dtype, backend per kind of layer, bytes packed and dense, patches of a MODEL."""
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    counts = count(parameters)
    dense_linears = sum(not is_packed(p) and not is_packable(name) and p.ndim == 2 for name, p in parameters.items())
    origin: Origin | None = patcher.get_attachment(ATTACHMENT)
    lines = []
    if origin is None:
        lines.append("Not loaded by a Bonsai node.")
    else:
        lines += [f"Bonsai Image 4B, {origin.variant}", f"source: {origin.source}", f"file: {origin.path}",
                  f"format: {origin.format}", *_published(Path(origin.path)), f"compute dtype: {origin.compute_dtype}"]
    choice = (backends.resolve(origin.setting, patcher.load_device, getattr(torch, origin.compute_dtype)) if origin else
              backends.resolve(backends.AUTO, patcher.load_device))
    backend = choice.backend + (", int8 activations" if choice.fast else "") + (
        f" ({choice.reason})" if choice.reason else "")
    lines += [f"packed: {layers} linears of {bits} bits in groups of {group}, backend {backend}"
              for (bits, group, _, _), layers in counts.packing.items()]
    path = patcher.get_attachment(MLX_ATTACHMENT)
    if path is not None:
        lines.append(f"path: {path.describe(patcher)}")
    lines.append(f"dense: {dense_linears} linears")
    lines.append(f"bytes: {counts.packed_bytes:,} packed, {counts.dense_bytes:,} dense")
    lines.append(f"device: {patcher.load_device}, patches on {len(patcher.patches)} weights")
    return "\n".join(lines)


def _published(path: Path) -> list[str]:
    """Which published files a model was loaded from, as lines; none if they are gone."""
    with contextlib.suppress(ModelFileError, OSError):
        return [f"published: {text}" for file in tensor_files(path) if (text := publication(file))]
    return []


def show(text: str, node_id: str) -> None:
    """Show ``text`` on the node: the frontend shows text output only for a few built-in nodes."""
    PromptServer.instance.send_progress_text(text, node_id)


class BonsaiModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiModelInfo",
            display_name="Bonsai Model Info",
            category=CATEGORY,
            description="Show what a MODEL is made of: variant, backend, bytes packed and dense, dtype, source.",
            search_aliases=["bonsai", "inspect model", "vram", "size"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[io.Model.Input("model", tooltip="Any MODEL from a Bonsai loader.")],
            outputs=[io.String.Output("info", display_name="info")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        text = describe(model)
        show(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
