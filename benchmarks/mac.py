"""MLX on a Mac: is it correct, how long does a denoising step take, how much memory does it need?

    python benchmarks/mac.py [--checkpoint DIR] [--sizes 512 1024] [--steps 4] [--without-dense]
    python benchmarks/mac.py --tiny        a miniature on any CPU: shows that the script runs, measures nothing

Needs an Apple silicon Mac with macOS 14 and MLX (pip install mlx). First the correctness of what MLX computes here,
then one table: seconds and memory of the diffusion model's four paths, each in a process of its own. Without
--checkpoint, the weights are random in the full size. With it, a whole image is drawn with it as well.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from load import FULL, peak_bytes, random_model

from bonsai_image.loaders import Transformer, find_repository, load_transformer
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.ops.backends import Setting
from bonsai_image.ops.backends.mlx import backend as mlx_backend
from bonsai_image.ops.packed import is_packed, packed_nbytes
from bonsai_image.standalone.generate import Compute, complete_repository, generate
from bonsai_image.standalone.models import transformer_module
from bonsai_image.tests.support.random_model import write_repository

#: Name -> what it is. ``mlx`` is what ``auto`` means on a Mac.
PATHS = {"mlx": "whole transformer in MLX", "layers": "MLX in each layer", "torch": "torch, packed",
         "dense": "torch, dense"}
SMALL = KleinConfig(num_attention_heads=2, joint_attention_dim=384, num_layers=2, num_single_layers=2)
TOKEN_PIXELS = 16


def step_inputs(config: KleinConfig, pixels: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arguments of one step of a square image, on ``device``: 512 text tokens in the full model."""
    text = 512 if config == FULL else 20
    generator, one, side = torch.Generator().manual_seed(0), torch.arange(1), torch.arange(pixels // TOKEN_PIXELS)
    floats = {"hidden_states": torch.randn(1, len(side) ** 2, config.in_channels, generator=generator),
              "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, generator=generator),
              "timestep": torch.tensor([0.7])}
    ids = {"img_ids": torch.cartesian_prod(one, side, side, one),
           "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text))}
    return {name: value.to(device, dtype) for name, value in floats.items()} | {
        name: value.to(device) for name, value in ids.items()}


def build(path: str, model: Transformer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer as one of :data:`PATHS`."""
    if path == "dense":
        tensors = {name: tensor.dequantize() if is_packed(tensor) else tensor for name, tensor in model.tensors.items()}
        return transformer_module(replace(model, tensors=tensors), device, dtype, Setting("torch"))
    if path != "layers":
        return transformer_module(model, device, dtype, Setting(path))
    module = transformer_module(model, device, dtype, Setting("torch"))
    for layer in module.modules():
        if hasattr(layer, "setting"):
            layer.setting = Setting("mlx")
    return module


def synchronise(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def measure(path: str, source: str | None, sizes: list[int], steps: int, tiny: bool) -> dict:
    """Time and memory of one path, in this process."""
    import mlx.core as mx

    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("mps"), torch.bfloat16)
    model = load_transformer(source) if source else random_model(SMALL if tiny else FULL, 2, Path("random"))
    stored = sum(packed_nbytes(tensor) if is_packed(tensor) else tensor.nbytes for tensor in model.tensors.values())
    config, module = model.config, build(path, model, device, dtype)
    del model
    synchronise(device)
    weights = mx.get_active_memory() / 1e6
    result = {"path": path, "stored": stored / 1e6, "weights": weights, "sizes": {}}
    for pixels in sizes:
        inputs = step_inputs(config, pixels, device, dtype)
        module(**inputs, return_dict=False)
        synchronise(device)
        mx.reset_peak_memory()
        start = time.perf_counter()
        for _ in range(steps):
            module(**inputs, return_dict=False)
        synchronise(device)
        result["sizes"][str(pixels)] = {
            "seconds": (time.perf_counter() - start) / steps, "mlx": mx.get_peak_memory() / 1e6,
            "torch": torch.mps.driver_allocated_memory() / 1e6 if device.type == "mps" else 0.0,
            "process": peak_bytes() / 1e6}
        mx.clear_cache()
    return result


@torch.inference_mode()
def correctness(tiny: bool) -> None:
    """What MLX computes on this machine's default device, against torch on the CPU in float32."""
    import mlx.core as mx

    if not tiny:
        try:
            mx.asarray(torch.ones(8, device="mps"), copy=False)
            print("torch's Metal memory: shared with MLX")
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            print(f"torch's Metal memory: copied ({str(error).splitlines()[0]})")
    cpu, dtypes = torch.device("cpu"), [torch.float32] if tiny else [torch.float32, torch.bfloat16, torch.float16]
    for bits, name in ((2, "ternary"), (1, "binary")):
        model = random_model(SMALL, bits, Path("random"))
        expected = build("torch", model, cpu, torch.float32)(**step_inputs(SMALL, 128, cpu, torch.float32),
                                                             return_dict=False)[0]
        for dtype in dtypes:
            device = cpu if tiny else torch.device("mps")
            for path in ("mlx", "layers"):
                module = build(path, model, device, dtype)
                out = module(**step_inputs(SMALL, 128, device, dtype), return_dict=False)[0].cpu().float()
                error = float((out - expected).norm() / expected.norm())
                print(f"{name}, {PATHS[path]}, {str(dtype).removeprefix('torch.')}: relative error {error:.1e}")


def draw(checkpoint: Path, sizes: list[int], steps: int, tiny: bool) -> None:
    """A whole image per size: seconds and process memory of each stage, and MLX's peak."""
    import mlx.core as mx

    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("mps"), torch.bfloat16)
    for pixels in sizes:
        mx.reset_peak_memory()
        stages = generate(complete_repository(checkpoint), ["a bonsai tree in a clay pot"],
                          Compute(device, dtype, Setting("mlx")), pixels, pixels, steps, progress=False).stages
        print(f"\nimage {pixels} x {pixels}: {sum(stage['seconds'] for stage in stages.values()):.2f} s, "
              f"MLX peak {mx.get_peak_memory() / 1e6:.0f} MB, process peak {peak_bytes() / 1e6:.0f} MB")
        for name, stage in stages.items():
            print(f"  {name:<22}{stage['seconds']:>8.2f} s{stage['megabytes']:>8.0f} MB in the process")


def table(results: list[dict]) -> None:
    print(f"\n| {'path':<24} | size | s/step | of dense | MLX peak MB | torch MB | process peak MB |")
    print(f"|{'-' * 26}|-----:|-------:|---------:|------------:|---------:|----------------:|")
    dense = next((result["sizes"] for result in results if result["path"] == "dense"), None)
    for result in results:
        for pixels, row in result["sizes"].items():
            ratio = f"{row['seconds'] / dense[pixels]['seconds']:.2f}" if dense else "-"
            print(f"| {PATHS[result['path']]:<24} | {pixels:>4} | {row['seconds']:>6.2f} | {ratio:>8} "
                  f"| {row['mlx']:>11.0f} | {row['torch']:>8.0f} | {row['process']:>15.0f} |")
    whole = next(result for result in results if result["path"] == "mlx")
    print(f"\nwhole transformer: {whole['weights']:.0f} MB of weights in MLX, of which "
          f"{whole['weights'] - whole['stored']:.0f} MB beside the {whole['stored']:.0f} MB of the file")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a downloaded repository")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels (default: 512 1024; 64 128 with --tiny)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--without-dense", action="store_true", help="leave out the 7.8 GB of dense weights")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = args.sizes or ([64, 128] if args.tiny else [512, 1024])
    if not args.tiny and not (sys.platform == "darwin" and platform.machine() == "arm64"):
        print("This measures MLX on an Apple silicon Mac, and this machine is none. Nothing was run. "
              "(--tiny runs a miniature on any CPU.)")
        return 2
    source = str(find_repository(args.checkpoint).transformer) if args.checkpoint else None
    if args.measure:
        print(json.dumps(measure(args.measure, source, sizes, args.steps, args.tiny)))
        return 0
    print(f"{platform.platform()}, {platform.processor()}, torch {torch.__version__}")
    problem = mlx_backend.problem(torch.device("mps"))
    print(f"self-check of the packed product: {problem or 'passed'}")
    if problem:
        return 1
    correctness(args.tiny)
    arguments = [*sys.argv[1:], "--measure"]
    results = []
    for path in PATHS:
        if path != "dense" or not args.without_dense:
            done = subprocess.run([sys.executable, __file__, *arguments, path], stdout=subprocess.PIPE, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    table(results)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or (write_repository(Path(folder) / "bonsai-miniature") if args.tiny else None)
        if checkpoint is not None:
            draw(checkpoint, sizes, args.steps, args.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
