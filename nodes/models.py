"""Files to ComfyUI's own MODEL, CLIP and VAE; and what a MODEL is made of, as text."""

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args as host_args

from ..loaders import ModelFileError, load_text_encoder, load_transformer, load_vae
from ..loaders.description import count, publication
from ..loaders.files import Progress, Stamps, no_progress
from ..loaders.klein import is_packable
from ..loaders.names import to_comfyui
from ..loaders.opening import fingerprint, tensor_files
from ..loaders.qwen3 import Qwen3Config
from ..ops import backends
from ..ops.backends import libraries
from ..ops.devices import DTYPES, default_dtype
from ..ops.packed import is_packed
from . import advice, encoding, lora
from .operations import packed_operations

#: Attachment of a MODEL from a Bonsai loader: its :class:`Origin`.
ATTACHMENT = "bonsai_image"
#: Attachment of a MODEL that MLX computes: its ``mlx_path.MlxPath``.
MLX_ATTACHMENT = "bonsai_image_mlx"
#: ComfyUI's name for the text encoders of FLUX.2 Klein, 4B and 9B, by the width that it knows them by.
_TEXT_ENCODERS = {2560: "qwen3_4b", 4096: "qwen3_8b"}


class Origin(NamedTuple):
    """Where a MODEL came from, and how it computes. ``size`` is 4B or 9B, ``source`` the release, ``compute_dtype``
    and ``setting`` the choice of the user."""

    path: str
    format: str
    size: str
    variant: str
    source: str
    compute_dtype: str
    setting: backends.Setting
    stamps: Stamps


def progress_bar(parts: int = 1) -> list[Progress]:
    """Callbacks for the progress bar of the running node, one for each of the ``parts`` of its work, in order."""
    bar = comfy.utils.ProgressBar(100 * parts)

    def part(number: int) -> Progress:
        return lambda done, total: bar.update_absolute(100 * number + 100 * done // max(total, 1))

    return [part(number) for number in range(parts)]


#: ComfyUI's options for dtypes, and the dtype that each means on a CPU. The others say how to store dense weights.
_OPTIONS = {
    "diffusion model": {"fp64_unet": torch.float64, "fp32_unet": torch.float32, "bf16_unet": torch.bfloat16,
                        "fp16_unet": torch.float16, "force_fp32": torch.float32},
    # Told to store them in FP16, ComfyUI still computes in FP32.
    "text encoder": {"fp32_text_enc": torch.float32, "fp16_text_enc": torch.float32, "force_fp32": torch.float32},
}


def dtype_to_impose(part: str, name: str, device: torch.device) -> torch.dtype | None:
    """The dtype to impose on ComfyUI: ``name`` (``auto`` or one of :data:`DTYPES`), then ComfyUI's options.

    None: ComfyUI chooses, by the same options, which is right everywhere but on a CPU.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return None
    return next((dtype for option, dtype in _OPTIONS[part].items() if getattr(host_args, option)),
                default_dtype(device))


def load_model(path: str, compute_dtype: str = "auto", setting: backends.Setting = backends.EXACT,
               disable_dynamic: bool = False, progress: Progress = no_progress):
    """The MODEL at ``path``. ``compute_dtype`` is ``auto`` or a name in ``ops.devices.DTYPES``.

    Raises ModelFileError. ComfyUI calls it again with the same arguments for a clone on another device.
    """
    loaded = load_transformer(path, progress, mmap=not host_args.disable_mmap)
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
    size, _ = loaded.config.published
    origin = Origin(path, loaded.format, size, loaded.variant, loaded.source, compute_dtype, setting, loaded.stamps)
    patcher.set_attachments(ATTACHMENT, origin)
    if backends.only("mlx", setting, patcher.load_device, loaded.tensors.values(), _dtype(patcher)):
        with libraries.contained(libraries.MLX, "cannot run the whole transformer"):
            from . import mlx_path

            patcher.set_attachments(MLX_ATTACHMENT, mlx_path.install(patcher))
    return patcher


def text_dimensions(config: Qwen3Config) -> dict[str, int | bool]:
    """What ComfyUI's option ``qwen3_4b_model_config`` takes of the dimensions, all but the size of a head; and neither
    final norm nor head, which FLUX.2 Klein does not read."""
    return {name: size for name, size in vars(config).items() if name != "head_dim"} | {"final_norm": False,
                                                                                        "lm_head": False}


#: The CLIPs and VAEs that ComfyUI, or anything else, still holds, by what they were loaded from.
_HELD: weakref.WeakValueDictionary[tuple, object] = weakref.WeakValueDictionary()


def kept(load: Callable, path: str, progress: Progress, *options: str):
    """``load(path, *options)``, or what that returned before, if it still exists and the file is the same: a change of
    the MODEL's inputs makes ComfyUI run the loader of all three again."""
    key = (load, path, fingerprint(Path(path)), *options)
    if (found := _HELD.get(key)) is None:
        found = _HELD[key] = load(path, *options, progress=progress)
    progress(1, 1)
    return found


def load_clip(path: str, compute_dtype: str = "auto", place: str = "default", disable_dynamic: bool = False,
              progress: Progress = no_progress):
    """The CLIP at ``path``, its linears computing in ``compute_dtype``, on the device ``place``: ``cpu``, or where
    ComfyUI puts it. Raises ModelFileError.

    ComfyUI runs text encoders in FP32, and so does ``auto``, except on a CPU with fast BF16: there the linears compute
    in BF16, which the release was made for, between ComfyUI's FP32 layers.
    """
    loaded = load_text_encoder(path, progress, mmap=not host_args.disable_mmap, whole=False)
    width = loaded.config.hidden_size
    if width not in _TEXT_ENCODERS:
        raise ModelFileError(path, "a text encoder 2560 wide (Qwen3-4B) or 4096 (Qwen3-8B)", f"one {width} wide",
                             "choose the text encoder of Bonsai Image 4B")
    cpu = torch.device("cpu")
    devices = {"load_device": cpu, "offload_device": cpu} if place == "cpu" else {}
    dtype = dtype_to_impose("text encoder", compute_dtype,
                            devices.get("load_device") or comfy.model_management.text_encoder_device())
    clip = comfy.sd.load_text_encoder_state_dicts(
        [loaded.tensors], clip_type=comfy.sd.CLIPType.FLUX2,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={**devices, "custom_operations": packed_operations(backends.AUTO, dtype),
                       f"{_TEXT_ENCODERS[width]}_model_config": text_dimensions(loaded.config)},
        disable_dynamic=disable_dynamic)
    lora.install(clip.patcher)
    encoding.show_progress(clip)
    encoding.remember_prompt(clip)
    clip.patcher.cached_patcher_init = (
        lambda **options: load_clip(path, compute_dtype, place, **options).patcher, ())
    return clip


def load_vae_model(path: str, progress: Progress = no_progress):
    """The VAE at ``path``, which is read at once: ``progress`` is not called. Raises ModelFileError."""
    loaded = load_vae(path, mmap=not host_args.disable_mmap)
    vae = advice.AdvisingVAE(sd=dict(loaded.tensors))
    if vae.first_stage_model is None:
        raise ModelFileError(path, "a ComfyUI that supports this VAE", "an older one", "update ComfyUI")
    vae.patcher.cached_patcher_init = (lambda **_: load_vae_model(path).patcher, ())
    return vae


def _dtype(patcher) -> torch.dtype:
    """What the model of ``patcher`` computes in now: nodes may have changed it."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def _size(count: int) -> str:
    """So many bytes, as people say it; a GB is 1000 MB, as in the README."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def describe(patcher) -> str:
    """Variant, source, compute dtype, backend per kind of layer, size packed and dense, patches of a MODEL; of its path
    only the last two names, for ComfyUI saves the text in the workflow."""
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    counts = count(parameters)
    dense_linears = sum(not is_packed(p) and not is_packable(name) and p.ndim == 2 for name, p in parameters.items())
    origin = patcher.get_attachment(ATTACHMENT)
    if origin is None:
        lines, setting = ["Not loaded by a Bonsai node."], backends.AUTO
    else:
        lines = [f"Bonsai Image {origin.size}, {origin.variant}", f"source: {origin.source}",
                 f"file: {'/'.join(Path(origin.path).parts[-2:])}", f"format: {origin.format}",
                 *_published(Path(origin.path)),
                 f"asked for: compute_dtype {origin.compute_dtype}, backend {origin.setting.backend}, precision "
                 f"{origin.setting.precision}", f"compute dtype: {str(_dtype(patcher)).removeprefix('torch.')}"]
        setting = origin.setting
    found = backends.choices(setting, patcher.load_device, parameters.values(), _dtype(patcher))
    lines += [f"packed: {layers} linears of {bits} bits in groups of {group}, backend {choice}"
              + (f" ({choice.reason})" if choice.reason else "") for (bits, group, choice), layers in found.items()]
    if (path := patcher.get_attachment(MLX_ATTACHMENT)) is not None:
        lines.append(f"path: {path.describe(patcher)}")
    lines += [f"dense: {dense_linears} linears",
              f"size: {_size(counts.packed_bytes)} packed, {_size(counts.dense_bytes)} dense",
              f"device: {patcher.load_device}, patches on {len(patcher.patches)} weights"]
    return "\n".join(lines)


def _published(path: Path) -> list[str]:
    """Which published files a model was loaded from, as lines; none if they are gone."""
    with contextlib.suppress(ModelFileError, OSError):
        return [f"published: {text}" for file in tensor_files(path) if (text := publication(file))]
    return []
