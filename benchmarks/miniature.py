"""How often the trained miniature draws what the prompt says: dense, ternary and binary, the fast paths against the
exact one, and the packed weights with the LoRAs that bring them nearer to the dense ones.

    python benchmarks/miniature.py [--prompts 300] [--only-lora] [--lora ternary=FILE ...]

Held-out prompts (``miniature/train/scenes.py``), four steps, CFG 1; what a picture shows is measured by a program
(``miniature/train/measure.py``). PSNR is against the exact path: the same packed weights in FP32. On the CPU by
``auto``; ``fast`` needs llvmlite. Its int8 products equal ``ops/backends/interface.py`` (``tests/test_cpu.py``), as the
Triton kernel's do (``tests/test_triton.py``).
"""

import argparse

import numpy as np
import torch
from diffusers import Flux2KleinPipeline

from bonsai_image.loaders import find_repository, load_lora, load_text_encoder
from bonsai_image.miniature import demo
from bonsai_image.miniature.train.measure import held_out_scenes, score
from bonsai_image.ops import backends
from bonsai_image.ops.backends import Setting, selfcheck
from bonsai_image.ops.backends.interface import Digits
from bonsai_image.standalone import lora, models

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Row of the table: variant, dtype of the diffusion model's activations, int8 digits of them.
ROWS = (("dense", "fp32", 0), ("dense", "bf16", 0),
        *((variant, dtype, digits) for variant in ("ternary", "binary")
          for dtype, digits in (("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 2), ("bf16", "adaptive"), ("bf16", 1))))
NAMES: dict[Digits, str] = {0: "", 1: ", one digit", 2: ", two digits", "adaptive": ", fast"}
COLUMNS = ("colour", "shape", "position", "size", "count", "background", "leaves", "all")


def transformer(variant: str, dtype: torch.dtype, digits: Digits) -> torch.nn.Module:
    """Its packed layers multiply with so many digits whatever is the fastest, where the cpu backend takes them."""
    selfcheck.fastest = lambda ways, *_: next((way for way in ways if way.digits == digits), ways[0])
    backends.PRECISIONS["auto"] = (digits, 0)
    return models.transformer_module(demo.load(variant), CPU, dtype, Setting())


def psnr(drawn: torch.Tensor, wanted: torch.Tensor) -> str:
    return f"{10 * np.log10(4 / float((drawn - wanted).square().mean())):.1f} dB"


def pictures(pipeline: Flux2KleinPipeline, module: torch.nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    """(N, 3, 128, 128) in -1 to 1, decoded in FP32."""
    pipeline.register_modules(transformer=module)
    parts = []
    for i in range(0, len(embeddings), 50):
        part = embeddings[i:i + 50]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        latents = pipeline(prompt_embeds=part.to(module.dtype), width=demo.SIDE, height=demo.SIDE,
                           num_inference_steps=4, guidance_scale=1.0, generator=generators,
                           output_type="latent").images
        parts.append(pipeline.vae.decode(latents.float(), return_dict=False)[0].clamp(-1, 1))
    return torch.cat(parts)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--only-lora", action="store_true", help="only the second table, exact in FP32")
    parser.add_argument("--lora", action="append", default=[], metavar="VARIANT=FILE",
                        help="not the shipped ones; can be given several times")
    args = parser.parse_args()
    repository = find_repository(demo.MINIATURE / "ternary")
    encoder = models.text_encoder_module(load_text_encoder(repository.text_encoder), CPU, torch.float32)
    pipeline = Flux2KleinPipeline(
        scheduler=models.scheduler(repository.scheduler), vae=models.vae_module(repository.vae, CPU, torch.float32),
        text_encoder=encoder, tokenizer=models.tokenizer(repository.tokenizer), transformer=None, is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts)
    embeddings, _ = pipeline.encode_prompt([scene.caption() for scene in scenes], device=CPU,
                                           max_sequence_length=pipeline.tokenizer.model_max_length)
    exact: dict[str, torch.Tensor] = {}
    reference = 0.0
    print(f"{args.prompts} held-out prompts, 4 steps\n\n| weights | activations |"
          + "".join(f" {name} |" for name in COLUMNS) + " of dense | PSNR to exact |\n"
          + "|---" * (len(COLUMNS) + 4) + "|")
    for variant, dtype, digits in ROWS:
        if args.only_lora and (dtype, digits) != ("fp32", 0):
            continue
        drawn = pictures(pipeline, transformer(variant, DTYPES[dtype], digits), embeddings)
        right = score(scenes, drawn)
        reference = reference or right["all"]
        nearness = psnr(drawn, exact[variant]) if variant in exact else ""
        exact.setdefault(variant, drawn)
        print(f"| {variant} | {dtype}{NAMES[digits]} |"
              + "".join(f" {100 * right[name]:.1f} % |" for name in COLUMNS)
              + f" {100 * right['all'] / reference:.1f} % | {nearness} |", flush=True)
    print("\n| FP32 | all | PSNR to dense |\n|---|---|---|")
    loras = [text.split("=", 1) for text in args.lora] or [*demo.RECOVERY.items()]
    drawn = {variant: exact[variant] for variant, _ in loras}
    for variant, file in loras:
        module = transformer(variant, torch.float32, 0)
        with lora.applied(lora.hooks(module, [(load_lora(demo.MINIATURE / file), 1.0)])):
            drawn[f"{variant} + {file}"] = pictures(pipeline, module, embeddings)
    for name, images in drawn.items():
        right = score(scenes, images)["all"]
        print(f"| {name} | {100 * right:.1f} % | {psnr(images, exact['dense'])} |", flush=True)


if __name__ == "__main__":
    main()
