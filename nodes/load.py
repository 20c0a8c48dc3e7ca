"""The nodes that load MODEL, CLIP and VAE."""

from __future__ import annotations

import sys

from comfy_api.latest import io

from ..loaders import container_suffixes, find_repository
from ..ops import backends
from ..ops.devices import DTYPES
from . import folders, models

#: Where ComfyUI lists the nodes.
CATEGORY = "model/loaders/bonsai"


def _compute_dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype", options=["auto", *DTYPES], default="auto", optional=True, advanced=True,
        tooltip="Dtype of the activations. auto: ComfyUI's choice, or BF16 on a CPU with fast BF16. The packed weights "
                "stay exact.")


def _backend_input() -> io.Combo.Input:
    return io.Combo.Input(
        "backend", options=list(backends.NAMES), default="auto", optional=True, advanced=True,
        tooltip="What computes with the packed weights. auto: the fastest backend that runs on this device.")


def _precision_input() -> io.Combo.Input:
    return io.Combo.Input(
        "precision", options=list(backends.PRECISIONS), default="exact", optional=True, advanced=True,
        tooltip="exact: activations keep their dtype. fast: activations are rounded to int8, which changes the image "
                "slightly; NVIDIA GPUs since Ampere, same as exact elsewhere. The packed weights stay exact.")


def _backend_setting(backend: str, precision: str) -> backends.Setting:
    """The backend setting for ``models.load_model``.

    Raises ValueError if a backend chosen by name is not installed. ``auto`` never raises.
    """
    problem = backends.problem(backend)
    if problem is not None:
        raise ValueError(f"The backend {backend} cannot be used: {problem}; run pip as "
                         f"{folders.shell_command(sys.executable, '-m', 'pip')}, or set backend to auto.")
    return backends.Setting(backend, precision)


class BonsaiCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiCheckpointLoader",
            display_name="Load Bonsai Checkpoint",
            category=CATEGORY,
            description="Load a whole downloaded Bonsai Image repository: diffusion model, text encoder and VAE.",
            search_aliases=["bonsai", "prismml", "ternary", "1-bit", "2-bit", "low bit", "flux 2 klein"],
            inputs=[
                io.Combo.Input("checkpoint", options=folders.repository_choices(),
                               tooltip="A repository folder under models/diffusers, such as "
                                       "bonsai-image-ternary-4B-mlx-2bit."),
                _compute_dtype_input(),
                _backend_input(),
                _precision_input(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool:
        """Replaces ComfyUI's combo check: the frontend hides its message behind an icon, but shows in full what
        ``execute`` raises."""
        return True

    @classmethod
    def execute(cls, checkpoint: str, compute_dtype: str = "auto", backend: str = "auto",
                precision: str = "exact") -> io.NodeOutput:
        repository = find_repository(folders.resolve("diffusers", checkpoint))
        repository.require("text_encoder", "vae")
        return io.NodeOutput(
            models.load_model(str(repository.transformer), compute_dtype, _backend_setting(backend, precision)),
            models.load_clip(str(repository.text_encoder)),
            models.load_vae_model(str(repository.vae)),
        )


class BonsaiModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiModelLoader",
            display_name="Load Bonsai Diffusion Model",
            category=CATEGORY,
            description="Load a Bonsai Image diffusion model in any published format, packed weights as they are.",
            search_aliases=["bonsai", "ternary", "1-bit", "2-bit", "unet", "load diffusion model"],
            inputs=[
                io.Combo.Input("model_name", options=folders.model_choices("diffusion_models", container_suffixes()),
                               tooltip="A file or folder under models/diffusion_models: GemLite, MLX, GGUF, unpacked, "
                                       "or saved by Save Bonsai Model."),
                _compute_dtype_input(),
                _backend_input(),
                _precision_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool:
        return True  # as in BonsaiCheckpointLoader

    @classmethod
    def execute(cls, model_name: str, compute_dtype: str = "auto", backend: str = "auto",
                precision: str = "exact") -> io.NodeOutput:
        return io.NodeOutput(models.load_model(folders.resolve("diffusion_models", model_name), compute_dtype,
                                               _backend_setting(backend, precision)))


class BonsaiTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BonsaiTextEncoderLoader",
            display_name="Load Bonsai Text Encoder",
            category=CATEGORY,
            description="Load the Qwen3-4B text encoder of Bonsai Image: 4-bit MLX or HQQ, or dense.",
            search_aliases=["bonsai", "qwen3", "clip", "4-bit text encoder"],
            inputs=[
                io.Combo.Input("text_encoder_name", options=folders.model_choices("text_encoders"),
                               tooltip="A file or folder under models/text_encoders."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_name: str) -> bool:
        return True  # as in BonsaiCheckpointLoader

    @classmethod
    def execute(cls, text_encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(models.load_clip(folders.resolve("text_encoders", text_encoder_name)))
