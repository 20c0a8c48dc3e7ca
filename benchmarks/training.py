"""Train a LoRA on a full-size random model with ComfyUI's Train LoRA node, packed and dense: time and memory.

    COMFYUI_PATH=... python benchmarks/training.py [--size 256] [--steps 2] [--blocks 5 20] [--cases packed plain dense]

``packed`` is bypass mode, ``plain`` the node's other mode on the same weights, ``dense`` bypass mode on the same
weights in BF16, in ComfyUI's own layers. On the CPU in BF16, rank 8, gradient checkpointing block by block. Every case
runs in a process of its own; memory is its peak resident set above the imports, mapped files included. The first step
is not counted.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from load import FULL, peak_bytes, random_model
from torch.optim.optimizer import register_optimizer_step_post_hook

from bonsai_image.loaders import save_transformer

CASES = ("packed", "plain", "dense")


def measure(case: str, path: str, size: int, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes above the imports, for the model at ``path``."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd
    import comfy.utils
    from comfy_extras.nodes_train import TrainLoraNode

    from bonsai_image.nodes import models

    def load(disable_dynamic: bool = False):
        if case != "dense":
            return models.load_model(path, "bf16", disable_dynamic=disable_dynamic)
        model = comfy.sd.load_diffusion_model(path, {"dtype": torch.bfloat16}, disable_dynamic=disable_dynamic)
        model.cached_patcher_init = (load, ())
        return model

    before, ends = peak_bytes(), []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    latent = torch.randn(1, 128, size // 16, size // 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 512, FULL.joint_attention_dim, generator=torch.Generator().manual_seed(1))
    settings = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": steps + 1, "learning_rate": 1e-4, "rank": 8,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 2,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": case != "plain",
    }
    TrainLoraNode.execute(model=[load()], latents=[{"samples": latent}], positive=[[[text, {}]]],
                          **{name: [value] for name, value in settings.items()})
    return {"seconds": (ends[-1] - ends[0]) / steps, "peak": peak_bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels along each side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs=2, default=(FULL.num_layers, FULL.num_single_layers),
                        metavar=("DOUBLE", "SINGLE"), help="fewer than the model's 5 and 20, where memory is short")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.size, args.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        packed, dense = Path(scratch) / "packed.safetensors", Path(scratch) / "dense.safetensors"
        config = dataclasses.replace(FULL, num_layers=args.blocks[0], num_single_layers=args.blocks[1])
        model = random_model(config, 2, packed)
        save_transformer(model, packed, "comfy")
        if "dense" in args.cases:
            write_dense(model, dense)
        del model
        print(f"{args.size} x {args.size}, {args.blocks[0]} + {args.blocks[1]} blocks, "
              f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{'case':<8}{'seconds a step':>16}{'peak GB':>9}")
        for case in args.cases:
            done = subprocess.run([sys.executable, __file__, "--size", str(args.size), "--steps", str(args.steps),
                                   "--measure", case, str(dense if case == "dense" else packed)], check=True,
                                  stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{case:<8}{row['seconds']:>16.1f}{row['peak'] / 1e9:>9.2f}", flush=True)


def write_dense(model, path: Path) -> None:
    """The same weights in BF16, under ComfyUI's names."""
    from safetensors.torch import save_file

    from bonsai_image.loaders.names import to_comfyui
    from bonsai_image.ops.packed import is_packed

    save_file({name: (tensor.dequantize() if is_packed(tensor) else tensor).contiguous()
               for name, tensor in to_comfyui(model.tensors).items()}, path)


if __name__ == "__main__":
    main()
