"""Train the LoRAs that bring the packed miniature nearer to the dense one, by ``bonsai-image recover``:

    python -m bonsai_image.miniature.train.recovery [--work miniature-work] [--variants ternary binary] [--seed 0]
        [--updates 300]

Each is trained at :data:`RANK` on the captions of the training scenes. ``--shrink`` writes the directions that change
the layers' results most, as many as fit into :data:`BYTES`, in FP8: what the repository keeps, of both after 300
updates of seed 0. What fits of the better binary LoRA of 800 updates is worse (docs/recovery.md).
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch

from bonsai_image.loaders import load_lora, save_lora
from bonsai_image.loaders.klein import layers
from bonsai_image.loaders.lora import Lora
from bonsai_image.miniature import demo
from bonsai_image.miniature.train.scenes import random_scene
from bonsai_image.ops import Setting
from bonsai_image.standalone import cli, generate, models

RANK, SCENES, UPDATES = 32, 4000, {"ternary": 300, "binary": 800}
#: Of one file, and of the entry of a tensor in its header; prompts that the shares of a layer's inputs are taken from.
BYTES, _ENTRY, _SAMPLE = 124_000, 130, 16
_FP8 = torch.float8_e4m3fn


def captions() -> list[str]:
    """Of scenes that training may see."""
    source = random.Random(1)
    return [random_scene(source).caption() for _ in range(SCENES)]


def train(variant: str, seed: int, updates: int, work: Path) -> Path:
    """The LoRA of one variant, in BF16."""
    out, prompts = work / f"{variant}-{seed}.safetensors", work / "prompts.txt"
    prompts.write_text("\n".join(captions()), encoding="utf-8")
    model = [] if variant == "ternary" else ["--transformer", str(demo.MINIATURE / demo.VARIANTS[variant])]
    status = cli.main(["recover", "--checkpoint", str(demo.MINIATURE / "ternary"), *model,
                       "--teacher", str(demo.MINIATURE / "dense"), "--prompts", str(prompts), "--out", str(out),
                       "--work", str(work / "latents"), "--width", str(demo.SIDE), "--height", str(demo.SIDE),
                       "--dtype", "fp32", "--device", "cpu", "--backend", "torch", "--rank", str(RANK),
                       "--updates", str(updates), "--batch", "32", "--per-device-batch", "32",
                       "--held-out", "100", "--learning-rate", "1e-2", "--save-minutes", "2", "--seed", str(seed)])
    if status:
        raise SystemExit(status)
    return out


@torch.inference_mode()
def moments(variant: str) -> dict[str, torch.Tensor]:
    """The sum of ``x x^T`` (K, K) over the inputs of every packed layer, by ComfyUI's name."""
    compute = generate.Compute(torch.device("cpu"), torch.float32, Setting("torch"))
    repository = generate.complete_repository(demo.MINIATURE / "ternary")
    embeddings = generate.encode(generate.text_pipeline(repository, compute), captions()[:_SAMPLE], compute)
    model, found = demo.load(variant), defaultdict(lambda: torch.zeros(()))
    transformer = models.transformer_module(model, *compute)

    def add(name: str):
        def hook(_module, inputs, _result):
            x = inputs[0].flatten(0, -2)
            found[name] = found[name] + x.T @ x

        return hook

    for name, (sources, shape) in layers(model.config.num_layers, model.config.num_single_layers).items():
        if len(shape) == 2:
            layer = transformer.get_submodule(sources[0].removesuffix(".weight"))
            layer.register_forward_hook(add(name.removesuffix(".weight")))
    generate.denoise(generate.image_pipeline(repository, transformer, compute), embeddings, range(_SAMPLE), demo.SIDE,
                     demo.SIDE, steps=4)
    return found


def shrunk(lora: Lora, inputs: dict[str, torch.Tensor]) -> Lora:
    """``lora`` with the directions that change the results for such ``inputs`` most, as many as fit into
    :data:`BYTES`."""
    parts = {}
    for target, group in lora.groups.items():
        moment = inputs[target.layer] / inputs[target.layer].diagonal().mean()
        values, vectors = torch.linalg.eigh(moment + 1e-4 * torch.eye(len(moment)))
        root, scale = values.clamp(min=1e-9).sqrt(), float(inputs[target.layer].diagonal().mean()) ** 0.5
        change = group["lora_up.weight"].float() @ group["lora_down.weight"].float()
        u, s, v = torch.linalg.svd(change @ (vectors * root) @ vectors.T, full_matrices=False)
        parts[target] = u, s, v @ (vectors / root) @ vectors.T, scale
    # What a direction costs is a byte for each input and output of the layer.
    ranked = sorted(((float(value * scale) ** 2 / (len(u) + v.shape[1]), len(u) + v.shape[1], target)
                     for target, (u, s, v, scale) in parts.items() for value in s[:RANK]),
                    key=lambda each: each[0], reverse=True)
    ranks, left = dict.fromkeys(parts, 0), BYTES - 3 * _ENTRY * len(parts)
    for _, size, target in ranked:
        if size <= left:
            ranks[target], left = ranks[target] + 1, left - size
    groups = {target: _factors(u[:, :rank], s[:rank, None] * v[:rank])
              for target, (u, s, v, _) in parts.items() if (rank := ranks[target])}
    return Lora(lora.path, lora.metadata, groups)


def _factors(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """``up @ down`` as FP8 factors, equally strong, that fill its range; alpha takes that back."""
    balance = down.norm(dim=1).sqrt()
    factors = {"lora_up.weight": up * balance, "lora_down.weight": down / balance[:, None]}
    scales = {name: torch.finfo(_FP8).max / 2 / factor.abs().max() for name, factor in factors.items()}
    alpha = up.shape[1] / (scales["lora_up.weight"] * scales["lora_down.weight"])
    return {name: (factor * scales[name]).to(_FP8) for name, factor in factors.items()} | {"alpha": alpha}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("miniature-work"))
    parser.add_argument("--variants", nargs="+", choices=demo.RECOVERY, default=list(demo.RECOVERY))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, help=f"default: {UPDATES}")
    parser.add_argument("--shrink", type=Path, metavar="FOLDER", help="write what the repository keeps to this folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        out = args.work / f"{variant}-{args.seed}.safetensors"
        out = out if out.exists() else train(variant, args.seed, args.updates or UPDATES[variant], args.work)
        if args.shrink:
            kept = args.shrink / demo.RECOVERY[variant]
            kept.unlink(missing_ok=True)
            save_lora(shrunk(load_lora(out), moments(variant)), kept)


if __name__ == "__main__":
    main()
