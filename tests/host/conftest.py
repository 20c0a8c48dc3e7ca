"""The real ComfyUI, imported from COMFYUI_PATH and run on the CPU."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve()

if str(COMFYUI) not in sys.path:
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = True

# After the host: it sets up torch for the flags above.
from bonsai_image.loaders import Transformer, load_transformer, save_transformer  # noqa: E402
from bonsai_image.loaders.names import to_comfyui  # noqa: E402
from bonsai_image.loaders.qwen3 import Qwen3Config  # noqa: E402
from bonsai_image.nodes import models  # noqa: E402
from bonsai_image.ops.packed import is_packed  # noqa: E402
from bonsai_image.tests.support import random_model  # noqa: E402
from bonsai_image.tests.support.reference import dense64  # noqa: E402

#: The width the host's Klein encoder is detected by, and its real vocabulary; everything else as small as can be.
TEXT = Qwen3Config(num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1, intermediate_size=128)
KLEIN = dataclasses.replace(random_model._KLEIN, joint_attention_dim=3 * 2560)
#: The host fixes the widths of the encoder; the decoder's are read off its tensors.
VAE = {"block_out_channels": (128, 256, 512, 512), "decoder_block_out_channels": (32, 64, 128, 128),
       "layers_per_block": 2, "latent_channels": 32}


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return COMFYUI


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A whole miniature repository that the host accepts."""
    return random_model.write_repository(tmp_path_factory.mktemp("host") / "bonsai-mini-ternary", 2, klein=KLEIN,
                                         text=TEXT, vae=VAE)


@pytest.fixture(scope="session")
def transformer(repository) -> Path:
    return repository / "transformer-packed-mflux"


@pytest.fixture(scope="session")
def binary_transformer(tmp_path_factory) -> Path:
    """A binary diffusion model in our own format."""
    path = tmp_path_factory.mktemp("host") / "bonsai-mini-binary.safetensors"
    tensors = random_model.random_transformer(KLEIN, 1, torch.Generator().manual_seed(1))
    save_transformer(Transformer(path, "comfy", tensors, KLEIN), path, "comfy")
    return path


@pytest.fixture(autouse=True)
def unload():
    """Leave no model loaded behind a test."""
    import comfy.model_management

    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()


@pytest.fixture(scope="session", autouse=True)
def exact_text_encoder():
    """Two int8 digits, which a text encoder may choose as the fastest, round more than dense FP32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.backends, "AUTO", models.backends.EXACT)
        yield


@pytest.fixture
def inputs():
    """latent (2, 128, 6, 4), sigma and context for one call of the diffusion model."""
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(2, 128, 6, 4, generator=generator), torch.tensor([0.8, 0.3]),
            torch.randn(2, 20, KLEIN.joint_attention_dim, generator=generator))


@pytest.fixture(scope="module")
def pair(transformer):
    """The packed MODEL and a dense one of ComfyUI's own layers."""
    import comfy.sd

    tensors = to_comfyui(load_transformer(transformer).tensors)
    dense = {name: dense64(t).float() if is_packed(t) else t.float() for name, t in tensors.items()}

    def load(disable_dynamic: bool = False):
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(dense), disable_dynamic=disable_dynamic)
        patcher.cached_patcher_init = (load, ())
        return patcher

    return models.load_model(str(transformer), "fp32"), load()


@pytest.fixture(scope="module")
def packed_model(pair):
    return pair[0]


@pytest.fixture(scope="module")
def dense_model(pair):
    return pair[1]


@pytest.fixture(scope="module")
def tensors(transformer):
    """The weights of ``packed_model`` by ComfyUI's names."""
    return to_comfyui(load_transformer(transformer).tensors)
