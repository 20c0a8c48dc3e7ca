"""Modules of diffusers and transformers with packed weights."""

import functools
import inspect
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from ..loaders import ModelFileError, TextEncoder, Transformer, load_vae
from ..loaders.errors import DOWNLOAD_FOLDER, refusing
from ..loaders.names import to_comfyui, to_diffusers
from ..loaders.qwen3 import TAPPED_LAYERS
from ..loaders.whole import SCHEDULER, tokenizer_files
from ..ops.backends import EXACT, Setting, libraries, only
from ..ops.linear import PackedEmbedding, PackedLinear
from ..ops.packed import is_packed


class MlxTransformer(torch.nn.Module):
    """Takes the place of ``diffusers.Flux2Transformer2DModel`` in a pipeline.

    The weights live in MLX alone; where a step fails there, ``fallback`` has them, and goes on. ``device`` and
    ``dtype`` are those of the tensors that go in and come out.
    """

    #: ``cache_context(name)``: nothing is cached between steps.
    cache_context = nullcontext
    backend = "mlx"

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype, setting: Setting = EXACT):
        from ..networks import klein_mlx

        super().__init__()
        self.config = SimpleNamespace(**model.config.diffusers())
        self.device, self.dtype = device, dtype
        self.fallback: torch.nn.Module | None = None
        self._diffusers = functools.partial(transformer_module, model, device, dtype, setting, layers=True)
        self._step = functools.partial(klein_mlx.step, klein_mlx.load(to_comfyui(model.tensors), dtype))

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor,
                img_ids: torch.Tensor, txt_ids: torch.Tensor, guidance: None = None,
                joint_attention_kwargs: dict | None = None, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Like diffusers': tokens ``(B, L, C)``, timestep ``(B,)`` from 0 to 1, ids ``(L, 4)`` or ``(B, L, 4)`` ->
        the prediction ``(B, L, C)`` in a tuple. Raises ValueError for what FLUX.2 Klein or this forward lacks."""
        if guidance is not None or joint_attention_kwargs or return_dict:
            raise ValueError("the MLX transformer takes no guidance and no attention arguments and returns a tuple")
        if self.fallback is None:
            rows = [ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids)]
            with libraries.contained(libraries.MLX, "fails in a step of the whole transformer"):
                return (self._step(hidden_states, rows[0], encoder_hidden_states, rows[1], timestep),)
            del self._step
            self.fallback = self._diffusers()
        return self.fallback(hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, return_dict=False)


def _fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype,
          setting: Setting = EXACT) -> torch.nn.Module:
    """Fill ``module``, built on the meta device: packed weights as they are, all others in ``dtype``."""
    for name, tensor in tensors.items():
        if is_packed(tensor):
            layer = name.removesuffix(".weight")
            dense = module.get_submodule(layer)
            n, k = tensor.shape
            packed = PackedEmbedding(n, k) if isinstance(dense, torch.nn.Embedding) else PackedLinear(k, n, bias=False)
            packed.setting = setting
            module.set_submodule(layer, packed)
    # On a packed weight ``to`` changes only the dtype that it presents, not its scales.
    cast = {name: tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    module.load_state_dict(cast, assign=True)
    return module.eval().requires_grad_(False)


def transformer_module(model: Transformer, device: torch.device, dtype: torch.dtype,
                       setting: Setting = EXACT, layers: bool = False) -> Flux2Transformer2DModel | MlxTransformer:
    """diffusers' FLUX.2 transformer with the weights of ``model``, computing in ``dtype``; in MLX where it is used,
    unless its ``layers`` are needed one by one."""
    if not layers and only("mlx", setting, device, model.tensors.values(), dtype):
        with libraries.contained(libraries.MLX, "cannot run the whole transformer"):
            return MlxTransformer(model, device, dtype, setting)
    with init_empty_weights():
        module = Flux2Transformer2DModel(**model.config.diffusers())
    return _fill(module, to_diffusers(model.tensors), dtype, setting).to(device)


def text_encoder_module(model: TextEncoder, device: torch.device, dtype: torch.dtype,
                        setting: Setting = EXACT) -> Qwen3Model:
    """transformers' Qwen3 with the weights of ``model`` that FLUX.2 Klein reads.

    ``fast`` is for the diffusion model, and means ``auto`` here.
    """
    setting = setting._replace(precision="auto") if setting.precision == "fast" else setting
    with init_empty_weights():
        module = Qwen3Model(Qwen3Config(**model.config.transformers() | {"num_hidden_layers": max(TAPPED_LAYERS)}))
    # Its output counts as the hidden state after the last layer.
    module.norm = torch.nn.Identity()
    tensors = {name: model.tensors[f"model.{name}"] for name in module.state_dict()}
    return _fill(module, tensors, dtype, setting).to(device)


def vae_module(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """diffusers' FLUX.2 VAE from a ``vae`` folder, by its ``config.json`` or defaults, in ``dtype``; on a CPU in FP32,
    as ComfyUI has it there: measured 1.4 times as fast as BF16, of which images show up to 1.6/255
    (``benchmarks/encode_decode.py``). Raises ModelFileError."""
    loaded, dtype = load_vae(path), torch.float32 if device.type == "cpu" else dtype
    # Published files hold keys that this class does not know, and would warn about in the middle of the progress bar.
    known = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    with init_empty_weights():
        module = AutoencoderKLFlux2(**{key: value for key, value in loaded.config.items() if key in known})
    try:
        module = _fill(module, loaded.tensors, dtype)
    except RuntimeError as error:
        # The first line only names the class.
        raise ModelFileError(path, "a config.json that describes the tensors", str(error).splitlines()[-1].strip(),
                             DOWNLOAD_FOLDER) from error
    return module.to(device)


def tokenizer(path: Path):
    """The tokenizer of a repository or checkpoint. No network, and code beside it never runs. Raises ModelFileError."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in tokenizer_files(path).items():
            Path(scratch, name).write_bytes(content)
        # The tokenizers library raises a plain Exception for a damaged file.
        with refusing(path, "a Qwen3 tokenizer, which needs no code of its own", DOWNLOAD_FOLDER, Exception):
            return AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)


def scheduler(path: Path | None) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in ``path``, by default FLUX.2 Klein's. Raises ModelFileError."""
    if path is None:
        return FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    with refusing(path, "diffusers' scheduler_config.json", DOWNLOAD_FOLDER, OSError, ValueError, TypeError):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(path, local_files_only=True)
