"""Our Triton kernels without a GPU: through the interpreter against plain torch, and compiled for six architectures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bonsai_image.ops import accelerator, int8_reference, torch_backend

pytest.importorskip("triton", reason="Triton is not installed here")

LAB = Path(__file__).parent / "lab"


def run_lab(script: str, *args: str) -> list[dict]:
    """Run a script of ``tests/lab`` in a process of its own; the JSON lines it printed."""
    # The kernels are read when they are first imported: the interpreter cannot be turned on later.
    done = subprocess.run([sys.executable, str(LAB / script), *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return run_lab("triton_cases.py")


@pytest.mark.parametrize(("prefix", "count"), [("dequantise-", 73), ("exact-", 13), ("quantise-rows-", 3),
                                               ("int8-", 15), ("operator-", 11)])
def test_kernels_agree_with_torch(cases, prefix, count):
    chosen = [case for case in cases if case["name"].startswith(prefix)]
    assert len(chosen) == count
    assert not [case for case in chosen if not case["error"] <= case["tolerance"]]


#: Shared memory of a block in KB: 99 on consumer cards since Ampere, 227 on Hopper, 64 on AMD's.
@pytest.mark.parametrize(("arch", "shared"), [("80", 99), ("89", 99), ("90", 227), ("120", 99), ("gfx1100", 64),
                                              ("gfx942", 64)])
def test_kernels_compile_without_a_gpu(arch, shared):
    built = {case["name"]: case for case in run_lab("compile_cases.py", arch)}
    assert len(built) == 8
    assert all(case["code"] for case in built.values())
    assert max(case["shared"] for case in built.values()) <= shared * 1024
    assert built["int8-matmul"]["matrix"], "int8 products must run on matrix units"
    # Bit-exactness rests on it: the reference rounds a product before it adds, and so does the rounding to int8 (which
    # AMD's division hides).
    assert built["expand-4-affine"]["fma"] == 0
    assert built["quantise-rows"]["fma"] == 0 or arch.startswith("gfx")


@pytest.mark.parametrize(("n", "k", "itemsize", "blocks"), [
    (27648, 3072, 2, 1), (3072, 12288, 2, 1), (27648, 3072, 1, 1), (27648, 3072, 4, 2), (9728, 2560, 2, 1),
    (5, 64, 2, 1)])
def test_the_workspace_is_bounded(n, k, itemsize, blocks):
    """Every layer of the model is expanded in one piece in 16 bits, and nothing larger than the limit ever is."""
    from bonsai_image.ops.triton_backend import row_blocks

    parts = list(row_blocks(n, k, itemsize))
    assert len(parts) == blocks
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(n))
    assert max(part.stop - part.start for part in parts) * k * itemsize <= 200e6


def random_layer(m=64, n=256, k=1024, bits=2):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // 128, generator=generator).add(0.5).bfloat16()
    return torch.randn(m, k, generator=generator), codes, scale


@pytest.mark.parametrize("bits", [1, 2])
def test_int8_error_is_the_rounding_of_activations_alone(bits):
    x, codes, scale = random_layer(bits=bits)
    weight = torch_backend.dequantize(codes, scale, None, bits, "symmetric", torch.float64)
    q, row = int8_reference.quantise_rows(x)
    rounded = q.double() * row.double()[:, None]
    out = int8_reference.fast(x, codes, scale, bits).double()
    assert torch.linalg.norm(out - rounded @ weight.t()) / torch.linalg.norm(out) < 1e-6
    # amax of 1024 normal numbers is about 3.4: the step is 3.4 / 127, its rounding 0.77 % of their size.
    error = torch.linalg.norm(out - x.double() @ weight.t()) / torch.linalg.norm(out)
    assert 0.004 < error < 0.012


def test_self_check_sees_a_wrong_way(monkeypatch):
    """The check that guards every way at first use: it passes what is right and refuses what is wrong."""
    cpu = torch.device("cpu")
    for form, bits, group in (("symmetric", 2, 128), ("affine", 4, 64), ("zeropoint", 4, 64)):
        assert accelerator.self_check("torch", cpu, bits, form, group, torch.bfloat16, torch.bfloat16) == 0
    right = torch_backend.packed_linear

    def shifted(*args):
        return right(*args).roll(1, 1)

    monkeypatch.setattr(torch_backend, "packed_linear", shifted)
    assert accelerator.self_check("torch", cpu, 2, "symmetric", 128, torch.bfloat16, torch.bfloat16) > 1
    monkeypatch.setattr(torch_backend, "packed_linear", lambda *args: right(*args) * float("nan"))
    assert accelerator.self_check("torch", cpu, 2, "symmetric", 128, torch.bfloat16, torch.bfloat16) > 1


def test_what_fails_is_named_once_and_refused(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr(accelerator, "multiply", broken)
    kind = ("triton", torch.device("cpu"), 2, "symmetric", 128, torch.float16, torch.float16)
    for _ in range(3):
        assert not accelerator.works(*kind)
    accelerator._check.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Bonsai Image: triton failed on cpu (no C compiler), another way serves."]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")])
def test_running_out_of_memory_refuses_nothing(monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(accelerator, "multiply", full)
    with pytest.raises(type(error)):
        accelerator.works("triton", torch.device("cpu"), 2, "symmetric", 128, torch.float16, torch.float32)
    monkeypatch.undo()
    assert accelerator.self_check("torch", torch.device("cpu"), 2, "symmetric", 128, torch.float16, torch.float32) == 0


def test_compile_sees_one_call():
    """Shapes without data: the operator tells its result, whatever serves."""
    codes, scale = torch.empty(48, 32, dtype=torch.uint8, device="meta"), torch.empty(48, 1, device="meta")
    x = torch.empty(2, 5, 128, dtype=torch.bfloat16, device="meta")
    out = accelerator.accelerated_linear(x, codes, scale, None, 2, "symmetric", None, "triton")
    assert out.shape == (2, 5, 48)
    assert out.dtype == torch.bfloat16
