"""The nodes (ComfyUI V3 schema). The only folder that imports the host."""

from __future__ import annotations

import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

from ..loaders import PackError, find_repository, load_transformer, save_transformer
from ..ops import backends
from ..ops.devices import DTYPES
from . import models
from .checks import shell_command
from .info import describe

_CATEGORY = "model/loaders/bonsai"


def _compute_dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype", options=["auto", *DTYPES], default="auto", optional=True, advanced=True,
        tooltip="Dtype of activations. auto: the host's choice, and BF16 on a CPU that multiplies it fast. The packed "
                "weights stay exact in any case.")


def _backend_input() -> io.Combo.Input:
    return io.Combo.Input(
        "backend", options=list(backends.NAMES), default="auto", optional=True, advanced=True,
        tooltip="What multiplies the packed weights. auto: the fastest that works on this device.")


def _precision_input() -> io.Combo.Input:
    return io.Combo.Input(
        "precision", options=list(backends.PRECISIONS), default="exact", optional=True, advanced=True,
        tooltip="exact: activations keep their dtype. fast: they are rounded to int8, which changes the picture a "
                "little; NVIDIA cards since Ampere, exact elsewhere. The packed weights stay exact in any case.")


def _chosen(backend: str, precision: str) -> str:
    """What was chosen on a node, for ``load_model``. Who chose a backend by name is told if it is not there; ``auto``
    takes another, and so does every backend on a device of another kind."""
    problem = backends.problem(backend)
    if problem is not None:
        raise ValueError(f"The backend {backend} cannot be used: {problem}; run pip as "
                         f"{shell_command(sys.executable, '-m', 'pip')}, or set backend to auto.")
    return backends.select(backend, precision)


def _show(text: str, node_id: str) -> None:
    """Show ``text`` on the node: the frontend displays the text output of none but a few nodes of its own."""
    PromptServer.instance.send_progress_text(text, node_id)


class BonsaiPackLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiPackLoader",
            display_name="Load Bonsai Image Pack",
            category=_CATEGORY,
            description="Load a whole downloaded Bonsai Image repository: diffusion model, text encoder and VAE.",
            search_aliases=["bonsai", "prismml", "ternary", "1-bit", "2-bit", "low bit", "flux 2 klein"],
            inputs=[
                io.Combo.Input("pack", options=models.repository_choices(),
                               tooltip="A repository folder under models/diffusers, such as "
                                       "bonsai-image-ternary-4B-mlx-2bit."),
                _compute_dtype_input(),
                _backend_input(),
                _precision_input(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, pack: str) -> bool:
        """In place of the host's check, which only says that a name is not in the list. The frontend hides what this
        would say behind an icon, and shows in full what ``execute`` raises."""
        return True

    @classmethod
    def execute(cls, pack: str, compute_dtype: str = "auto", backend: str = "auto",
                precision: str = "exact") -> io.NodeOutput:
        repository = find_repository(models.resolve("diffusers", pack))
        for part in ("text_encoder", "vae"):
            if getattr(repository, part) is None:
                raise PackError(repository.path, f"a folder with the {part.replace('_', ' ')}", "none",
                                "download the whole repository again")
        return io.NodeOutput(
            models.load_model(str(repository.transformer), compute_dtype, _chosen(backend, precision)),
            models.load_clip(str(repository.text_encoder)),
            models.load_vae_model(str(repository.vae)),
        )


class BonsaiModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiModelLoader",
            display_name="Load Bonsai Diffusion Model",
            category=_CATEGORY,
            description="Load a Bonsai Image diffusion model in any published format, packed weights as they are.",
            search_aliases=["bonsai", "ternary", "1-bit", "2-bit", "unet", "load diffusion model"],
            inputs=[
                io.Combo.Input("model_name", options=models.model_choices("diffusion_models"),
                               tooltip="A file or folder under models/diffusion_models: GemLite, MLX, unpacked, or "
                                       "saved by Save Bonsai Model."),
                _compute_dtype_input(),
                _backend_input(),
                _precision_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool:
        return True  # as in BonsaiPackLoader

    @classmethod
    def execute(cls, model_name: str, compute_dtype: str = "auto", backend: str = "auto",
                precision: str = "exact") -> io.NodeOutput:
        return io.NodeOutput(models.load_model(models.resolve("diffusion_models", model_name), compute_dtype,
                                               _chosen(backend, precision)))


class BonsaiTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiTextEncoderLoader",
            display_name="Load Bonsai Text Encoder",
            category=_CATEGORY,
            description="Load the Qwen3-4B text encoder of Bonsai Image: 4-bit MLX or HQQ, or dense.",
            search_aliases=["bonsai", "qwen3", "clip", "4-bit text encoder"],
            inputs=[
                io.Combo.Input("text_encoder_name", options=models.model_choices("text_encoders"),
                               tooltip="A file or folder under models/text_encoders."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_name: str) -> bool:
        return True  # as in BonsaiPackLoader

    @classmethod
    def execute(cls, text_encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(models.load_clip(models.resolve("text_encoders", text_encoder_name)))


class BonsaiSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiSaveModel",
            display_name="Save Bonsai Model",
            category=_CATEGORY,
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
                               tooltip="packed: as in memory, loads without conversion. base3: five ternary weights "
                                       "a byte, 14 % smaller; ternary models only."),
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
        # From the file it was loaded from: the MODEL in memory may be offloaded or in use.
        progress = models.progress_bar()
        save_transformer(load_transformer(origin.path, progress), Path(folder) / file, "comfy", storage == "base3",
                         progress)
        saved = f"{subfolder}/{file}".lstrip("/")
        _show(f"Saved {saved}", cls.hidden.unique_id)
        return io.NodeOutput(ui=ui.PreviewText(saved))


class BonsaiModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiModelInfo",
            display_name="Bonsai Model Info",
            category=_CATEGORY,
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
        _show(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class BonsaiExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [BonsaiPackLoader, BonsaiModelLoader, BonsaiTextEncoderLoader, BonsaiSaveModel, BonsaiModelInfo]
