"""Peak device memory of a full-size model, counted on a pretended GPU without computing anything.

    python count_memory.py embedded [SIZE ...]        # COMFYUI_PATH=... python count_memory.py comfyui [SIZE ...]
    COMFYUI_PATH=... python count_memory.py decoders [SIZE ...]      # diffusers' FLUX.2 VAE, a narrow one, and taef2

Prints one line of JSON for each size and precision: megabytes (10**6 bytes) of each stage, weights included. Every
storage counts from its birth to its death, rounded up as torch's allocator does. Not in it: workspaces of cuDNN and
cuBLAS, the fragmentation of the allocator, and the context that CUDA itself needs.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

HOST, SIZES = sys.argv[1], [int(size) for size in sys.argv[2:]] or [512, 1024]
sys.argv = sys.argv[:1]
if HOST != "embedded":
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True

import gpu_kernels_stand_in  # noqa: E402
import pretended_gpu  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLFlux2  # noqa: E402
from pretended_gpu import DEVICES, record  # noqa: E402

from bonsai_image.loaders.klein import (  # noqa: E402
    KleinConfig,
    diffusers_shapes,
    is_packable,
)
from bonsai_image.loaders.qwen3 import TAPPED_LAYERS, Qwen3Config, is_read, qwen3_shapes  # noqa: E402
from bonsai_image.ops.backends import Setting  # noqa: E402
from bonsai_image.ops.packed import packed_weight  # noqa: E402
from bonsai_image.tests.support import random_model  # noqa: E402

KLEIN = KleinConfig()
QWEN3 = Qwen3Config(num_hidden_layers=max(TAPPED_LAYERS))
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 32}
DEVICE = DEVICES[0]
PROMPT = "a bonsai tree"


def untouched(shapes: dict, bits: int, group: int, packable) -> dict[str, torch.Tensor]:
    """Tensors of memory that nobody ever reads or writes."""
    result = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and packable(name):
            n, k = shape
            scale = torch.empty(n, k // group, dtype=torch.bfloat16)
            form, shift = ("symmetric", None) if bits < 4 else ("affine", torch.empty_like(scale))
            result[name] = packed_weight(torch.empty(n, k * bits // 8, dtype=torch.uint8), scale, bits, form, shift)
        else:
            result[name] = torch.empty(shape, dtype=torch.bfloat16)
    return result


def transformer() -> dict[str, torch.Tensor]:
    return untouched(diffusers_shapes(KLEIN), 2, 128, is_packable)


def text_encoder() -> dict[str, torch.Tensor]:
    shapes = {name: shape for name, shape in qwen3_shapes(QWEN3).items() if is_read(name)}
    return untouched(shapes, 4, 64, lambda _name: True)


def vae() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = AutoencoderKLFlux2(**VAE)
    return {name: torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in module.state_dict().items()}


def megabytes(stages: dict[str, float]) -> dict[str, float]:
    return {name: round(size / 1e6, 1) for name, size in stages.items()}


def embedded(folder: Path) -> None:
    from bonsai_image.standalone import generate, models

    random_model.write_tokenizer(folder)
    repository = SimpleNamespace(text_encoder=None, tokenizer=folder, vae=None, transformer=None, scheduler=None)
    generate.loaders.load_text_encoder = lambda *_, **_options: SimpleNamespace(config=QWEN3, tensors=text_encoder())
    generate.loaders.load_transformer = lambda *_, **_options: SimpleNamespace(
        config=KLEIN, tensors=transformer(), variant="ternary", format="counted", source="counted", path=folder,
        stamps={})
    models.load_vae = lambda *_, **_options: SimpleNamespace(config=VAE, tensors=vae())
    pretended_gpu.install()
    gpu_kernels_stand_in.install()
    gpu_kernels_stand_in.allocate_only()
    pretended_gpu.count_only()
    for precision in ("exact", "fast"):
        for size in SIZES:
            compute = generate.Compute(DEVICE, torch.bfloat16, Setting("auto", precision))
            result = generate.generate(repository, [PROMPT], compute, size, size, steps=1, progress=False)
            stages = {name: figures["megabytes"] * 1e6 for name, figures in result.stages.items()}
            print(json.dumps({"host": HOST, "precision": precision, "size": size, **megabytes(stages)}), flush=True)


def comfyui(_folder: Path) -> None:
    import comfy.model_management as management
    import comfy.sample
    import pretended_aimdo

    from bonsai_image.nodes import models

    pretended_aimdo.PAGE = 32 << 20
    pretended_aimdo.install("dynamic")
    gpu_kernels_stand_in.install()
    gpu_kernels_stand_in.allocate_only()
    models.load_text_encoder = lambda *_, **_options: SimpleNamespace(config=QWEN3, tensors=text_encoder())
    models.load_transformer = lambda *_, **_options: SimpleNamespace(
        config=KLEIN, tensors=transformer(), variant="ternary", format="counted", source="counted", path=Path(),
        stamps={})
    models.load_vae = lambda *_, **_options: SimpleNamespace(config=VAE, tensors=vae())
    pretended_gpu.count_only()
    with torch.inference_mode():
        for precision in ("exact", "fast"):
            for size in SIZES:
                stages = {}

                def stage(name, call, stages=stages):
                    management.unload_all_models()
                    record.clear()
                    result = call()
                    management.reset_cast_buffers()
                    stages[name] = record.peak[DEVICE.index]
                    return result

                clip = models.load_clip("")
                condition = stage("encode", lambda clip=clip: clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT)))
                model = models.load_model("", setting=Setting("auto", precision))
                noise = torch.zeros(1, 128, size // 16, size // 16)
                latent = stage("denoise", lambda model=model, noise=noise, condition=condition: comfy.sample.sample(
                    model, noise, 1, 1.0, "euler", "simple", condition, condition, noise, disable_pbar=True))
                stage("decode", lambda latent=latent: models.load_vae_model("").decode(latent))
                print(json.dumps({"host": HOST, "precision": precision, "size": size, **megabytes(stages)}),
                      flush=True)


def decoders(_folder: Path) -> None:
    from comfy.taesd.taesd import TAESD

    pretended_gpu.install()
    pretended_gpu.count_only()
    for dtype in (torch.bfloat16, torch.float32):
        for size in SIZES:
            stages = {}
            for name, build, latent in (
                    ("full", lambda: AutoencoderKLFlux2(**VAE), (1, 32, size // 8, size // 8)),
                    ("small", lambda: AutoencoderKLFlux2(**VAE, decoder_block_out_channels=(96, 192, 384, 384)),
                     (1, 32, size // 8, size // 8)),
                    ("taef2", lambda: TAESD(latent_channels=128), (1, 128, size // 16, size // 16))):
                module = build().to(dtype).to(DEVICE)
                record.clear()
                with torch.inference_mode():
                    module.decode(torch.empty(latent, dtype=dtype, device=DEVICE))
                stages[name] = record.peak[DEVICE.index]
                del module
            print(json.dumps({"host": HOST, "dtype": str(dtype), "size": size, **megabytes(stages)}), flush=True)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        {"embedded": embedded, "comfyui": comfyui, "decoders": decoders}[HOST](Path(folder))
