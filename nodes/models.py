"""Files to ComfyUI's own MODEL, CLIP and VAE; and what a MODEL is made of, as text."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args as host_args

from ..loaders import ModelFileError, load_text_encoder, load_transformer, load_vae
from ..loaders.description import count, publication
from ..loaders.files import Progress, Stamps
from ..loaders.klein import is_packable
from ..loaders.names import to_comfyui
from ..loaders.opening import tensor_files
from ..loaders.qwen3 import Qwen3Config
from ..ops import backends
from ..ops.backends import libraries
from ..ops.devices import DTYPES, default_dtype
from ..ops.packed import is_packed
from . import advice, lora
from .operations import packed_operations

#: Attachment of a MODEL from a Bonsai loader: its :class:`Origin`.
ATTACHMENT = "bonsai_image"
#: Attachment of a MODEL that MLX computes: its ``mlx_path.MlxPath``.
MLX_ATTACHMENT = "bonsai_image_mlx"
#: The width by which ComfyUI recognises Klein's text encoder.
_TEXT_WIDTH = 2560


@dataclass(frozen=True)
class Origin:
    """Where a MODEL came from, and how it computes. ``source`` is the release, ``setting`` the user's choice."""

    path: str
    format: str
    variant: str
    source: str
    setting: backends.Setting
    stamps: Stamps


def progress_bar() -> Progress:
    """A callback for the progress bar of the running node."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


#: ComfyUI's options for dtypes, and the dtype that each means on a CPU. The others say how to store dense weights.
_OPTIONS = {
    "diffusion model": {"fp64_unet": torch.float64, "fp32_unet": torch.float32, "bf16_unet": torch.bfloat16,
                        "fp16_unet": torch.float16, "force_fp32": torch.float32},
    # Told to store them in FP16, ComfyUI still computes in FP32.
    "text encoder": {"fp32_text_enc": torch.float32, "fp16_text_enc": torch.float32, "force_fp32": torch.float32},
}


def dtype_to_impose(part: str, name: str, device: torch.device) -> torch.dtype | None:
    """The dtype to impose on ComfyUI: ``name`` (``auto`` or one of :data:`DTYPES`), then ComfyUI's options.

    None leaves it the choice, which it makes well, and by the same options, everywhere but on a CPU.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return None
    return next((dtype for option, dtype in _OPTIONS[part].items() if getattr(host_args, option)),
                default_dtype(device))


def load_model(path: str, compute_dtype: str = "auto", setting: backends.Setting = backends.EXACT,
               disable_dynamic: bool = False):
    """The MODEL at ``path``. ``compute_dtype`` is ``auto`` or a name in ``ops.devices.DTYPES``.

    Raises ModelFileError. ComfyUI calls it again with the same arguments for a clone on another device.
    """
    loaded = load_transformer(path, progress_bar(), mmap=not host_args.disable_mmap)
    dtype = dtype_to_impose("diffusion model", compute_dtype, comfy.model_management.get_torch_device())
    patcher = comfy.sd.load_diffusion_model_state_dict(
        # A copy: ComfyUI removes entries while it loads, and ``loaded`` is read again below.
        dict(to_comfyui(loaded.tensors)), model_options={"custom_operations": packed_operations(setting)},
        disable_dynamic=disable_dynamic)
    if patcher is None:
        raise ModelFileError(path, "a ComfyUI that supports FLUX.2 Klein", "an older one", "update ComfyUI")
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    lora.install(patcher)
    advice.check_inputs(patcher, loaded.config.joint_attention_dim)
    advice.check_files(patcher, loaded.stamps)
    patcher.cached_patcher_init = (load_model, (path, compute_dtype, setting))
    origin = Origin(path, loaded.format, loaded.variant, loaded.source, setting, loaded.stamps)
    patcher.set_attachments(ATTACHMENT, origin)
    if backends.only("mlx", setting, patcher.load_device, loaded.tensors.values(), _dtype(patcher)):
        with libraries.contained(libraries.MLX, "cannot run the whole transformer"):
            from . import mlx_path

            patcher.set_attachments(MLX_ATTACHMENT, mlx_path.install(patcher))
    return patcher


def text_dimensions(config: Qwen3Config) -> dict[str, int | bool]:
    """What ComfyUI's option ``qwen3_4b_model_config`` takes of the dimensions, all but the size of a head; and no final
    norm, which FLUX.2 Klein does not read."""
    return {name: size for name, size in vars(config).items() if name != "head_dim"} | {"final_norm": False}


def load_clip(path: str, compute_dtype: str = "auto", disable_dynamic: bool = False):
    """The CLIP at ``path``, its linears computing in ``compute_dtype``. Raises ModelFileError.

    ComfyUI runs text encoders in FP32, and so does ``auto``, except on a CPU with fast BF16: there the linears compute
    in BF16, which the release was made for, between ComfyUI's FP32 layers.
    """
    loaded = load_text_encoder(path, progress_bar(), mmap=not host_args.disable_mmap, whole=False)
    width = loaded.config.hidden_size
    if width != _TEXT_WIDTH:
        raise ModelFileError(path, f"a text encoder {_TEXT_WIDTH} wide (Qwen3-4B)", f"one {width} wide",
                             "choose the text encoder of Bonsai Image 4B")
    dtype = dtype_to_impose("text encoder", compute_dtype, comfy.model_management.text_encoder_device())
    clip = comfy.sd.load_text_encoder_state_dicts(
        [loaded.tensors], clip_type=comfy.sd.CLIPType.FLUX2,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"custom_operations": packed_operations(backends.AUTO, dtype),
                       "qwen3_4b_model_config": text_dimensions(loaded.config)},
        disable_dynamic=disable_dynamic)
    lora.install(clip.patcher)
    clip.patcher.cached_patcher_init = (lambda **options: load_clip(path, compute_dtype, **options).patcher, ())
    return clip


def load_vae_model(path: str):
    """The VAE at ``path``. Raises ModelFileError."""
    loaded = load_vae(path, mmap=not host_args.disable_mmap)
    vae = advice.AdvisingVAE(sd=dict(loaded.tensors))
    if vae.first_stage_model is None:
        raise ModelFileError(path, "a ComfyUI that supports this VAE", "an older one", "update ComfyUI")
    vae.patcher.cached_patcher_init = (lambda **_: load_vae_model(path).patcher, ())
    return vae


def _dtype(patcher) -> torch.dtype:
    """What the model of ``patcher`` computes in now: nodes may have changed it."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def describe(patcher) -> str:
    """Variant, source, compute dtype, backend per kind of layer, bytes packed and dense, patches of a MODEL."""
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    counts = count(parameters)
    dense_linears = sum(not is_packed(p) and not is_packable(name) and p.ndim == 2 for name, p in parameters.items())
    origin = patcher.get_attachment(ATTACHMENT)
    if origin is None:
        lines, setting = ["Not loaded by a Bonsai node."], backends.AUTO
    else:
        lines = [f"Bonsai Image 4B, {origin.variant}", f"source: {origin.source}", f"file: {origin.path}",
                 f"format: {origin.format}", *_published(Path(origin.path)),
                 f"compute dtype: {str(_dtype(patcher)).removeprefix('torch.')}"]
        setting = origin.setting
    found = backends.choices(setting, patcher.load_device, parameters.values(), _dtype(patcher))
    lines += [f"packed: {layers} linears of {bits} bits in groups of {group}, backend {choice}"
              + (f" ({choice.reason})" if choice.reason else "") for (bits, group, choice), layers in found.items()]
    if (path := patcher.get_attachment(MLX_ATTACHMENT)) is not None:
        lines.append(f"path: {path.describe(patcher)}")
    lines += [f"dense: {dense_linears} linears",
              f"bytes: {counts.packed_bytes:,} packed, {counts.dense_bytes:,} dense",
              f"device: {patcher.load_device}, patches on {len(patcher.patches)} weights"]
    return "\n".join(lines)


def _published(path: Path) -> list[str]:
    """Which published files a model was loaded from, as lines; none if they are gone."""
    with contextlib.suppress(ModelFileError, OSError):
        return [f"published: {text}" for file in tensor_files(path) if (text := publication(file))]
    return []
