"""Load full-size models (3.68 G packed weights, random): wall time, peak memory, resident bytes, file sizes.

    python benchmarks/load.py [--formats mlx gemlite comfy comfy-base3 diffusers] [--variants ternary binary]
                              [--keep DIR]

Every load runs in a process of its own. Memory is the peak resident set (file pages included) above what the imports
alone take. With COMFYUI_PATH set, each file is also loaded as a MODEL in ComfyUI on the CPU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bonsai_image.loaders import Transformer, load_transformer, save_transformer
from bonsai_image.loaders.formats.comfy import from_base3
from bonsai_image.loaders.klein import KleinConfig, diffusers_shapes, is_packable
from bonsai_image.ops.packed import is_packed, packed_nbytes, packed_weight

#: FLUX.2 Klein 4B.
FULL = KleinConfig()
VARIANTS = {"ternary": 2, "binary": 1}
FORMATS = ("mlx", "gemlite", "comfy", "comfy-base3", "diffusers")


def random_model(config: KleinConfig, bits: int, path: Path) -> Transformer:
    """A random model in canonical form; quick, because ternary codes are drawn as base-3 bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in diffusers_shapes(config).items():
        if not is_packable(name):
            tensors[name] = torch.randn(shape, generator=generator).mul(0.02).bfloat16()
            continue
        n, k = shape
        if bits == 2:
            digits = torch.randint(0, 243, (n, -(-k // 5)), generator=generator, dtype=torch.uint8)
            digits[:, -1] %= 3 ** (k - k // 5 * 5 or 5)
            codes = from_base3(digits, k)
        else:
            codes = torch.randint(0, 256, (n, k // 8), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, k // 128, generator=generator).add(0.5).mul(k**-0.5).bfloat16()
        tensors[name] = packed_weight(codes, scale, bits)
    return Transformer(path, "comfy", tensors, config)


def peak_bytes() -> int:
    """Peak resident set of this process. On Linux not ``ru_maxrss``, which a child inherits from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load_embedded(path: str):
    from bonsai_image.ops.devices import default_dtype
    from bonsai_image.standalone.models import transformer_module

    device = torch.device("cpu")
    yield
    yield transformer_module(load_transformer(path), device, default_dtype(device)).parameters()


def load_comfyui(path: str):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    from bonsai_image.nodes import models

    yield
    yield models.load_model(path).model.diffusion_model.parameters()


def measure(host: str, path: str) -> dict[str, float]:
    """Seconds, peak bytes above the imports, and bytes held in packed and dense weights."""
    steps = {"embedded": load_embedded, "ComfyUI": load_comfyui}[host](path)
    next(steps)
    before = peak_bytes()
    start = time.perf_counter()
    parameters = list(next(steps))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes() - before,
            "packed": sum(packed_nbytes(p) for p in parameters if is_packed(p)),
            "dense": sum(p.nbytes for p in parameters if not is_packed(p))}


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--keep", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--measure", nargs=2, metavar=("HOST", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    hosts = ["embedded", *(["ComfyUI"] if "COMFYUI_PATH" in os.environ else [])]
    print(f"{'variant':<9}{'format':<11}{'file GB':>9}{'host':>10}{'seconds':>9}{'peak GB':>9}{'peak/file':>10}"
          f"{'packed GB':>11}{'dense GB':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        for variant in args.variants:
            model = None
            for name in args.formats:
                if name == "comfy-base3" and variant == "binary":
                    continue
                path = root / variant / (f"{name}.safetensors" if name.startswith("comfy") else name)
                if not path.exists():
                    model = model or random_model(FULL, VARIANTS[variant], root / f"{variant}-random")
                    save_transformer(model, path, name)
            model = None
            for name in args.formats:
                path = next((p for p in (root / variant / f"{name}.safetensors", root / variant / name) if p.exists()),
                            None)
                for host in hosts if path else []:
                    done = subprocess.run([sys.executable, __file__, "--measure", host, str(path)], check=True,
                                          capture_output=True, text=True)
                    row = json.loads(done.stdout.splitlines()[-1])
                    print(f"{variant:<9}{name:<11}{size(path) / 1e9:>9.3f}{host:>10}{row['seconds']:>9.2f}"
                          f"{row['peak'] / 1e9:>9.2f}{row['peak'] / size(path):>10.2f}{row['packed'] / 1e9:>11.3f}"
                          f"{row['dense'] / 1e9:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
