"""The nodes (ComfyUI V3 schema). The only folder that imports the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .info import BonsaiModelInfo
from .load import BonsaiCheckpointLoader, BonsaiModelLoader, BonsaiTextEncoderLoader
from .save import BonsaiSaveModel


class BonsaiExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [BonsaiCheckpointLoader, BonsaiModelLoader, BonsaiTextEncoderLoader, BonsaiSaveModel, BonsaiModelInfo]
