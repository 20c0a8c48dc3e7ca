"""The nodes: three that load MODEL, CLIP and VAE, one that saves a MODEL, one that shows what it is made of."""

import functools
import os
import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

from ..loaders import container_suffixes, find_repository, load_transformer, save_transformer
from ..loaders.files import Progress, refuse_changed
from ..loaders.opening import fingerprint
from ..ops import backends
from ..ops.devices import DTYPES
from . import advice, folders, lora, models

#: A schema, with the place where ComfyUI lists the nodes.
_schema = functools.partial(io.Schema, category="model/loaders/bonsai")


def _compute_inputs() -> list[io.Combo.Input]:
    """The advanced inputs of the loaders of a MODEL. Each defaults to ``auto``."""
    inputs = {
        "compute_dtype": (["auto", *DTYPES], (
            "Dtype of the activations. auto: ComfyUI's choice, or BF16 on a CPU with fast BF16. The packed weights "
            "stay exact.")),
        "backend": (backends.NAMES, (
            "What computes with the packed weights. auto: the fastest backend that runs on this device.")),
        "precision": (backends.PRECISIONS, (
            "auto: at least as near as BF16, by what is fastest here. exact: within the rounding of the activations' "
            "dtype. fast: activations are rounded to int8, which changes the image slightly; NVIDIA GPUs since Ampere "
            "and CPUs with llvmlite; same as exact elsewhere. The packed weights stay exact.")),
    }
    return [io.Combo.Input(name, options=list(options), default="auto", optional=True, advanced=True, tooltip=text)
            for name, (options, text) in inputs.items()]


def _load_model(path: str, progress: Progress, compute_dtype: str = "auto", backend: str = "auto",
                precision: str = "auto"):
    """The MODEL at ``path``. The last are the inputs of :func:`_compute_inputs`, which a workflow may leave out.

    Raises ModelFileError, and ValueError if a backend chosen by name is not installed. ``auto`` is always there.
    """
    if problem := backends.problem(backend):
        raise ValueError("Set backend to auto, or run pip as "
                         f"{folders.shell_command(sys.executable, '-m', 'pip')}; the backend {backend} cannot be used: "
                         f"{problem}.")
    return models.load_model(path, compute_dtype, backends.Setting(backend, precision), progress=progress)


class _Loader(io.ComfyNode):
    """A node with a list of files or folders."""

    @classmethod
    def validate_inputs(cls, checkpoint: str = "", model_name: str = "", text_encoder_name: str = "") -> bool:
        """Replaces ComfyUI's check of these lists: the frontend hides its message behind an icon, but shows in full
        what ``execute`` raises."""
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", model_name: str = "", text_encoder_name: str = "", **_) -> list:
        """Makes ComfyUI load a file again that was replaced."""
        paths = (checkpoint and folders.resolve_checkpoint(checkpoint),
                 model_name and folders.resolve("diffusion_models", model_name),
                 text_encoder_name and folders.resolve("text_encoders", text_encoder_name))
        return [fingerprint(Path(path)) for path in paths if path]


class BonsaiCheckpointLoader(_Loader):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="BonsaiCheckpointLoader",
            display_name="Load Bonsai Checkpoint",
            description="Load a whole downloaded Bonsai Image repository: diffusion model, text encoder and VAE.",
            search_aliases=["bonsai", "prismml", "ternary", "binary", "1-bit", "2-bit", "mlx", "flux 2 klein"],
            inputs=[
                io.Combo.Input("checkpoint", options=folders.checkpoint_choices(),
                               tooltip="A repository folder under models/diffusers, such as "
                                       "bonsai-image-ternary-4B-mlx-2bit, or a file under models/checkpoints."),
                *_compute_inputs(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    @advice.action_first()
    def execute(cls, checkpoint: str, **compute: str) -> io.NodeOutput:
        repository = find_repository(folders.resolve_checkpoint(checkpoint))
        repository.require("text_encoder", "vae")
        transformer, text_encoder, vae = models.progress_bar(3)
        return io.NodeOutput(
            _load_model(str(repository.transformer), transformer, **compute),
            models.kept(models.load_clip, str(repository.text_encoder), text_encoder, "auto", "default"),
            models.kept(models.load_vae_model, str(repository.vae), vae),
        )


class BonsaiModelLoader(_Loader):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="BonsaiModelLoader",
            display_name="Load Bonsai Diffusion Model",
            description="Load a Bonsai Image diffusion model in any published format, packed weights as they are.",
            search_aliases=["bonsai", "ternary", "1-bit", "2-bit", "gguf", "mlx", "gemlite", "unet", "flux 2 klein"],
            inputs=[
                io.Combo.Input("model_name", options=folders.file_choices("diffusion_models", container_suffixes()),
                               tooltip="A file or folder under models/diffusion_models: GemLite, MLX, GGUF, unpacked, "
                                       "or saved by Save Bonsai Model."),
                *_compute_inputs(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @advice.action_first()
    def execute(cls, model_name: str, **compute: str) -> io.NodeOutput:
        (progress,) = models.progress_bar()
        return io.NodeOutput(_load_model(folders.resolve("diffusion_models", model_name), progress, **compute))


class BonsaiTextEncoderLoader(_Loader):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="BonsaiTextEncoderLoader",
            display_name="Load Bonsai Text Encoder",
            description="Load the Qwen3-4B text encoder of Bonsai Image: 4-bit MLX or HQQ, or dense.",
            search_aliases=["bonsai", "qwen3", "clip", "4-bit text encoder", "mlx", "hqq", "flux 2 klein"],
            inputs=[
                io.Combo.Input("text_encoder_name", options=folders.file_choices("text_encoders"),
                               tooltip="A file or folder under models/text_encoders."),
                io.Combo.Input("device", options=["default", "cpu"], default="default", optional=True, advanced=True,
                               tooltip="Where the text encoder runs. default: ComfyUI's choice. cpu: slower, but takes "
                                       "no GPU memory."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    @advice.action_first()
    def execute(cls, text_encoder_name: str, device: str = "default") -> io.NodeOutput:
        (progress,) = models.progress_bar()
        path = folders.resolve("text_encoders", text_encoder_name)
        return io.NodeOutput(models.kept(models.load_clip, path, progress, "auto", device))


class BonsaiSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="BonsaiSaveModel",
            display_name="Save Bonsai Model",
            description="Save the packed diffusion model as one safetensors file, without loss. Saved under "
                        "diffusion_models, it appears in Load Bonsai Diffusion Model once the list is refreshed.",
            search_aliases=["bonsai", "export model", "convert", "safetensors"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from a Bonsai loader. A LoRA cannot be stored in packed "
                                                "weights: connect the loader directly."),
                io.String.Input("filename_prefix", default="diffusion_models/bonsai",
                                tooltip="Where to save, under ComfyUI's output folder."),
                io.Combo.Input("storage", options=["packed", "base3"], default="packed",
                               tooltip="packed: as in memory; loads without conversion. base3: five ternary weights "
                                       "per byte, 14 % smaller; ternary models only."),
            ],
        )

    @classmethod
    @advice.action_first()
    def execute(cls, model, filename_prefix: str, storage: str) -> io.NodeOutput:
        origin = model.get_attachment(models.ATTACHMENT)
        if origin is None:
            raise ValueError("Use Save Model; this MODEL is not from a Bonsai loader.")
        if attached := lora.attached(model):
            raise ValueError(f"Connect the Bonsai loader to Save Bonsai Model directly; this MODEL has {attached} "
                             "attached, which cannot be stored in packed weights.")
        if storage == "base3" and origin.variant != "ternary":
            raise ValueError(f"Set storage to packed; base3 holds ternary weights, but this MODEL is {origin.variant}.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory())
        file = f"{name}_{counter:05}_.safetensors"
        refuse_changed(origin.stamps)
        # Read the file again: the MODEL in memory may be offloaded or in use.
        loading, saving = models.progress_bar(2)
        target = "comfy-base3" if storage == "base3" else "comfy"
        save_transformer(load_transformer(origin.path, loading), Path(folder) / file, target, saving)
        return io.NodeOutput(ui=ui.PreviewText("Saved " + f"{subfolder}/{file}".lstrip("/")))


class BonsaiModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="BonsaiModelInfo",
            display_name="Bonsai Model Info",
            description="Show what a MODEL is made of: variant, backend, bytes packed and dense, dtype, source.",
            search_aliases=["bonsai", "inspect model", "vram", "size"],
            is_output_node=True,
            inputs=[io.Model.Input("model", tooltip="Any MODEL from a Bonsai loader.")],
            outputs=[io.String.Output("info", display_name="info")],
        )

    @classmethod
    @advice.action_first()
    def execute(cls, model) -> io.NodeOutput:
        text = models.describe(model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class BonsaiExtension(ComfyExtension):
    async def on_load(self) -> None:
        os.environ.setdefault(backends.selfcheck.FILE,
                              str(Path(folder_paths.get_user_directory()) / "bonsai_image_times.json"))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [BonsaiCheckpointLoader, BonsaiModelLoader, BonsaiTextEncoderLoader, BonsaiSaveModel, BonsaiModelInfo]
