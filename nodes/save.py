"""The node that saves a diffusion model with its packed weights."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..loaders import load_transformer, save_transformer
from . import models
from .info import show
from .load import CATEGORY


class BonsaiSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiSaveModel",
            display_name="Save Bonsai Model",
            category=CATEGORY,
            description="Save the packed diffusion model as one safetensors file, without loss. Saved under "
                        "diffusion_models, it appears in Load Bonsai Diffusion Model once the list is refreshed.",
            search_aliases=["bonsai", "export model", "convert", "safetensors"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from a Bonsai loader. A LoRA cannot be stored in packed "
                                                "weights: connect the loader directly."),
                io.String.Input("filename_prefix", default="diffusion_models/bonsai",
                                tooltip="Where to save, under ComfyUI's output folder."),
                io.Combo.Input("storage", options=["packed", "base3"], default="packed",
                               tooltip="packed: as in memory; loads without conversion. base3: five ternary weights "
                                       "per byte, 14 % smaller; ternary models only."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, model, filename_prefix: str, storage: str) -> io.NodeOutput:
        origin = model.get_attachment(models.ATTACHMENT)
        if origin is None:
            raise ValueError("Save Bonsai Model needs a MODEL from a Bonsai loader; save others with Save Model.")
        if model.patches:
            raise ValueError("A LoRA or merge is attached to this MODEL and cannot be stored in packed weights; "
                             "connect the Bonsai loader to Save Bonsai Model directly.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory())
        file = f"{name}_{counter:05}_.safetensors"
        # Read the file again: the MODEL in memory may be offloaded or in use.
        progress = models.progress_bar()
        target = "comfy-base3" if storage == "base3" else "comfy"
        save_transformer(load_transformer(origin.path, progress), Path(folder) / file, target, progress)
        saved = f"{subfolder}/{file}".lstrip("/")
        show(f"Saved {saved}", cls.hidden.unique_id)
        return io.NodeOutput(ui=ui.PreviewText(saved))
