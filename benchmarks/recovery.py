"""Seconds and peak memory of an update of ``bonsai-image recover`` on a full-size random model, on this machine's CPU.

    python benchmarks/recovery.py [--size 512] [--rank 32] [--updates 1]

One image an update, BF16 activations, FP32 factors, checkpointing block by block. Latents and texts are random. Memory
is the peak resident set above the imports, mapped files included (Linux); the first update is not timed.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from load import FULL, peak_bytes, random_model

from bonsai_image.loaders import load_transformer, save_transformer
from bonsai_image.standalone import models
from bonsai_image.standalone.generate import Compute
from bonsai_image.standalone.recover import cost
from bonsai_image.standalone.recover.sampling import Sampler
from bonsai_image.standalone.recover.student import State, Student, new_factors

CPU = torch.device("cpu")


def run(path: Path, size: int, rank: int, updates: int) -> SimpleNamespace:
    """What training reads of a run, with random content."""
    sampler = Sampler(models.scheduler(None), size, size, 4, CPU)
    latents = torch.randn(5, sampler.tokens, FULL.in_channels)
    text = torch.randn(1, cost.TEXT, FULL.joint_attention_dim).bfloat16()
    args = SimpleNamespace(rank=rank, updates=updates, batch=1, per_device_batch=1, learning_rate=1e-4, seed=0, steps=4)
    return SimpleNamespace(args=args, sampler=sampler, compute=Compute(CPU, torch.bfloat16),
                           packed=load_transformer(path),
                           store=SimpleNamespace(latents=lambda _number, levels=slice(None): latents[levels]),
                           texts=lambda _numbers: text, trained=[0, 1], held_out=[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--updates", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "packed.safetensors"
        save_transformer(random_model(FULL, 2, Path(scratch) / "random"), path, "comfy")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the model
        before = peak_bytes()
        this = run(path, args.size, args.rank, args.updates)
        student, seconds = Student(this), []
        factors = new_factors(student.transformer, FULL, args.rank, 0)
        state = State({name: torch.nn.Parameter(factor) for name, factor in factors.items()}, factors)
        optimizer = torch.optim.AdamW(state.factors.values())
        with student.recovered(state.factors):
            for number in range(args.updates + 1):
                start = time.perf_counter()
                student._update(number, state, optimizer)
                seconds.append(time.perf_counter() - start)
        counted = cost.counted(FULL, this.sampler.tokens, 1, args.rank, path.stat().st_size)
        print(f"{args.size} x {args.size}, rank {args.rank}, {torch.get_num_threads()} threads, torch "
              f"{torch.__version__}: {min(seconds[1:]):.1f} s an update, {(peak_bytes() - before) / 1e9:.2f} GB at its "
              f"peak; counted, without the reserve for CUDA: {(counted.training - 1e9) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
