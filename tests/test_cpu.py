"""The cpu backend against float64, the reference and the definition of int8 products, for every instruction that this
machine has; AMX with its instructions emulated."""

import ctypes
import itertools
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from bonsai_image.ops import backends
from bonsai_image.ops.backends import Setting, selfcheck
from bonsai_image.ops.backends.cpu import backend as cpu_backend
from bonsai_image.ops.backends.interface import int8_product
from bonsai_image.ops.packed import Packed, dequantize

llvm = pytest.importorskip("llvmlite.binding")
kernels = pytest.importorskip("bonsai_image.ops.backends.cpu.kernels")
products = pytest.importorskip("bonsai_image.ops.backends.cpu.products")
ir_text = pytest.importorskip("bonsai_image.ops.backends.cpu.llvm")

CPU = torch.device("cpu")
KINDS = [name for name in kernels.kinds() if name != "amx" or cpu_backend.instruction() == "amx"]
INT8 = [name for name in KINDS if name != "portable"]
DTYPES = (torch.bfloat16, torch.float32)
DIGITS = (1, 2, "adaptive")


def random_packed(n, k, bits=2, form="symmetric", group=128, scale_dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(n * k + bits)
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, generator=generator)
    scale = torch.randn(n, k // group, generator=generator).to(scale_dtype)
    shift = None if form == "symmetric" else torch.randn(n, k // group, generator=generator).to(scale_dtype)
    return Packed(codes, scale, shift, bits, form)


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ("symmetric", "affine", "zeropoint"))
@pytest.mark.parametrize("bits", (1, 2, 4))
def test_expansion_is_the_reference_bit_for_bit(kind, bits, form):
    for group in (32, 64, 128):
        for dtype, integer in zip(DTYPES, (torch.int16, torch.int32), strict=True):
            for scale_dtype in (torch.bfloat16, torch.float16, torch.float32):
                packed = random_packed(37, 384, bits, form, group, scale_dtype)
                out = cpu_backend.expand(packed, dtype, kind, torch.empty(37, 384, dtype=dtype))
                assert torch.equal(out.view(integer), dequantize(packed, dtype).view(integer)), (group, scale_dtype)


def test_expansion_of_the_smallest_and_largest_scales():
    """Subnormal and huge scales, zeros of both signs, infinity."""
    values = [0.0, -0.0, 1e-40, -1e-45, 1.1754944e-38, 3e38, -3.4e38, float("inf")]
    packed = random_packed(8, 128)._replace(scale=torch.tensor(values)[:, None])
    for dtype, integer in zip(DTYPES, (torch.int16, torch.int32), strict=True):
        expected = dequantize(packed, dtype)
        out = cpu_backend.expand(packed, dtype, KINDS[0], torch.empty(8, 128, dtype=dtype))
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.view(integer)[~out.isnan()], expected.view(integer)[~out.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_products_against_float64(kind, dtype, threads):
    for m, n, k, bits, form, group in ((1, 37, 256, 1, "symmetric", 128), (7, 100, 384, 2, "symmetric", 128),
                                       (33, 65, 128, 4, "affine", 64), (3, 1, 128, 4, "zeropoint", 64)):
        packed = random_packed(n, k, bits, form, group)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = x.double() @ dequantize(packed, dtype).double().t()
        out = cpu_backend.multiply_exact(x, packed, kind)
        assert out.dtype == dtype
        roundings = 0.6 if dtype == torch.bfloat16 else 4
        assert (out.double() - expected).norm() <= roundings * torch.finfo(dtype).eps * expected.norm()


def activations(m, k, outlying=(7, 90)):
    """Strided, with columns 30 times as large as the rest, so that groups of both kinds of digits meet in a block."""
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m))[:, k:] * 3
    x[:, list(outlying)] *= 30
    return x


def equal_to_definition(out, x, packed, digits):
    """To the rounding of the result: that of float32, and for BF16 another one."""
    expected = int8_product(x, packed, digits)
    return (out.float() - expected).norm() <= (1e-6 if x.dtype == torch.float32 else 2**-8) * expected.norm()


@pytest.mark.parametrize("digits", DIGITS)
@pytest.mark.parametrize(("bits", "form", "group", "dtype"), [
    (1, "symmetric", 128, torch.float32), (2, "symmetric", 128, torch.bfloat16), (2, "symmetric", 64, torch.float32),
    (4, "symmetric", 128, torch.bfloat16), (4, "affine", 64, torch.bfloat16), (4, "zeropoint", 64, torch.float32)])
@pytest.mark.parametrize("kind", INT8)
def test_int8_products_are_their_definition(kind, bits, form, group, dtype, digits):
    """For ragged rows and columns, one block of rows and several."""
    for m, n, k in ((1, 64, 128), (8, 65, 256), (37, 200, 384), (130, 100, 1024)):
        packed, x = random_packed(n, k, bits, form, group), activations(m, k).to(dtype)
        assert equal_to_definition(cpu_backend.multiply_digits(x, packed, kind, digits), x, packed, digits), (m, n)


@pytest.mark.parametrize("kind", INT8)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    """Whatever the digits of the others are: images in one batch are the images one by one."""
    packed, x = random_packed(100, 1024), activations(50, 1024)
    x[::3, [7, 90]] /= 30  # a third of the rows has one digit everywhere
    for digits in DIGITS:
        together = cpu_backend.multiply_digits(x, packed, kind, digits)
        for rows in (slice(0, 1), slice(3, 4), slice(7, 31)):
            assert torch.equal(cpu_backend.multiply_digits(x[rows], packed, kind, digits), together[rows])


@pytest.mark.parametrize("digits", (0, 2))
def test_any_strides(digits):
    """Kernels take addresses: activations or codes whose rows are not contiguous must be copied first."""
    packed, x = random_packed(130, 256), torch.randn(40, 256)
    turned = packed._replace(codes=packed.codes.t().contiguous().t())
    expected = cpu_backend.multiply(x, packed, digits)
    assert torch.equal(cpu_backend.multiply(x.t().contiguous().t(), packed, digits), expected)
    assert torch.equal(cpu_backend.multiply(x, turned, digits), expected)


def test_what_it_leaves_to_torch(monkeypatch):
    """FP16, groups that are no whole words, and by int8 what does not fill a block."""
    def serves(packed, dtype=torch.bfloat16, rows=1, digits="adaptive"):
        return cpu_backend.serves(CPU, rows, packed, dtype, digits, False)

    packed = random_packed(64, 256)
    assert serves(packed) and serves(packed, digits=0) and serves(random_packed(64, 256, 4, "affine", 64))
    assert not serves(packed, torch.float16) and not serves(packed, torch.float16, digits=0)
    assert not serves(random_packed(64, 256, group=16), digits=0)
    for other in (random_packed(63, 256), random_packed(64, 256, group=32)):
        assert serves(other, digits=0) and not serves(other)
    monkeypatch.setattr(cpu_backend, "instruction", lambda: "portable")
    assert cpu_backend.problem(CPU) is None and "not measured" in cpu_backend.problem(CPU, 2)


@pytest.mark.parametrize("kind", INT8)
def test_int8_products_in_several_blocks_of_rows(kind, monkeypatch, threads):
    monkeypatch.setattr(cpu_backend, "ACTIVATION_BYTES", 50 * 256)
    monkeypatch.setattr(cpu_backend, "WORK", 1)
    packed, x = random_packed(130, 256), activations(137, 256)
    for digits in DIGITS:
        assert equal_to_definition(cpu_backend.multiply_digits(x, packed, kind, digits), x, packed, digits)


@pytest.mark.parametrize("bits", (2, 4))
@pytest.mark.parametrize("kind", INT8)
def test_the_largest_sums_of_a_group_fit(kind, bits):
    """All codes at their largest and all activations at the ends of the digits, the worst case of 16-bit sums."""
    packed = random_packed(64, 256, bits)
    packed.codes.fill_(255)
    for sign in (1, -1):
        x = torch.full((9, 256), sign * 5.0)
        x[:, ::2] *= -1 if sign < 0 else 1
        for digits in DIGITS:
            assert equal_to_definition(cpu_backend.multiply_digits(x, packed, kind, digits), x, packed, digits)


@pytest.mark.parametrize("kind", INT8)
def test_int8_rows_of_zeros_and_not_finite(kind):
    packed, x = random_packed(64, 256), torch.randn(12, 256)
    x[3], x[4, 7], x[5, 100], x[6] = 0.0, float("nan"), float("inf"), 1e-38
    for dtype, digits in itertools.product(DTYPES, DIGITS):
        out = cpu_backend.multiply_digits(x.to(dtype), packed, kind, digits)
        assert torch.equal(out[3], torch.zeros(64, dtype=dtype))
        assert not out[4].isfinite().any() and not out[5].isfinite().any()
        assert out[[0, 1, 2, 6, 11]].isfinite().all()


# AMX


class Tiles:
    """AMX in Python: eight tiles of 16 rows of 64 bytes, and the instructions that the kernel uses."""

    def __init__(self):
        self.tiles, self.configured = torch.zeros(8, 16, 64, dtype=torch.int8), False
        signatures = {"ldtilecfg": "p", "tilerelease": "", "tilezero": "t", "tileloadd64": "tpi", "tilestored64": "tpi",
                      "tdpbsud": "ttt"}
        types = {"p": ctypes.c_void_p, "t": ctypes.c_uint8, "i": ctypes.c_int64}
        self.callbacks = []
        for name, arguments in signatures.items():
            function = ctypes.CFUNCTYPE(None, *(types[a] for a in arguments))(getattr(self, name))
            self.callbacks.append(function)
            llvm.add_symbol(f"emulated.{name}", ctypes.cast(function, ctypes.c_void_p).value)

    @staticmethod
    def rows(address, stride):
        return [(ctypes.c_int8 * 64).from_address(address + row * stride) for row in range(16)]

    def ldtilecfg(self, address):
        table = bytes((ctypes.c_uint8 * 64).from_address(address))
        self.configured = table == bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])

    def tilerelease(self):
        self.configured = False

    def tilezero(self, tile):
        assert self.configured
        self.tiles[tile] = 0

    def tileloadd64(self, tile, address, stride):
        self.tiles[tile] = torch.tensor([list(row) for row in self.rows(address, stride)], dtype=torch.int8)

    def tilestored64(self, tile, address, stride):
        for row, values in zip(self.rows(address, stride), self.tiles[tile].tolist(), strict=True):
            row[:] = values

    def tdpbsud(self, target, left, right):
        a = self.tiles[left].int().view(16, 16, 4)
        b = self.tiles[right].view(torch.uint8).int().view(16, 16, 4)
        self.tiles[target].view(torch.int32)[:] += torch.einsum("mki,kni->mn", a, b).int()


@pytest.mark.parametrize("digits", DIGITS)
@pytest.mark.parametrize(("bits", "form", "group"), [(1, "symmetric", 128), (2, "symmetric", 128), (4, "affine", 64)])
def test_amx_product_with_emulated_instructions(bits, form, group, digits, monkeypatch):
    """The addresses, layouts and sums of the AMX kernel, on any CPU: its instructions are calls of Python."""
    tiles = Tiles()

    def function(kernel, kind, /, **constants):
        text = re.sub(r"llvm\.x86\.(\w*til|tdp)", r"emulated.\1", ir_text.assemble(kernel, **constants))
        return ir_text.build(text, ir_text.target("", ""))

    monkeypatch.setattr(kernels, "function", function)
    packed, x = random_packed(70, 384, bits, form, group), activations(70, 384)
    assert equal_to_definition(cpu_backend.multiply_digits(x, packed, "amx", digits), x, packed, digits)
    assert not tiles.configured


@pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="instructions of x86")
@pytest.mark.parametrize(("kind", "instruction"), [("amx", "tdpbsud"), ("vnni512", r"vpdpbusd\s.*%zmm"),
                                                   ("vnni256", r"vpdpbusd\s.*%ymm"), ("avx2", r"vpmaddubsw\s.*%ymm")])
def test_every_product_assembles_to_its_instruction(kind, instruction):
    """On any x86 machine, also for CPUs that it is not."""
    text = ir_text.assemble(products.multiply, name=kind, bits=2, form="symmetric", group=128, wide=False,
                            digits="adaptive")
    machine = ir_text.target(kernels.KINDS[kind].cpu, kernels.KINDS[kind].features)
    assert re.search(instruction, machine.emit_assembly(llvm.parse_assembly(text)))


# Threads


def test_all_pieces_once(threads, monkeypatch):
    """By OpenMP's threads and by Python's, and by one where there is little to do."""
    def count(b: ir_text.Builder, worker: kernels.Integer, piece: kernels.Integer, counts: kernels.Address,
              workers: kernels.Address) -> None:
        b.write(b.plus(b.read(counts, ir_text.I64, piece), 1), counts, ir_text.I64, piece)
        b.write(b.plus(worker, 1), workers, ir_text.I64, piece)

    function = ir_text.build(ir_text.assemble(count), ir_text.target("", ""))
    for parallel, work in ((cpu_backend._gnu_openmp(), 1 << 40), (None, 1 << 40), (None, 1)):
        monkeypatch.setattr(cpu_backend, "_gnu_openmp", lambda parallel=parallel: parallel)
        counts, workers = torch.zeros(2, 10_000, dtype=torch.int64)
        cpu_backend.spread(function, 10_000, work, counts, workers)
        assert counts.eq(1).all() and workers.min() >= 1 and workers.max() <= (1 if work == 1 else threads)


def test_products_from_several_threads_at_once(threads, monkeypatch):
    monkeypatch.setattr(cpu_backend, "WORK", 1)
    packed, x = random_packed(200, 1024), activations(40, 1024)
    expected, results = cpu_backend.multiply_digits(x, packed, INT8[0], "adaptive"), []
    callers = [threading.Thread(target=lambda: results.extend(
        torch.equal(cpu_backend.multiply_digits(x, packed, INT8[0], "adaptive"), expected) for _ in range(5)))
        for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert results == [True] * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_multiplies():
    code = """
import os, sys, torch
from bonsai_image.ops.backends.cpu import backend
from bonsai_image.ops.packed import Packed
torch.set_num_threads(2)
packed = Packed(torch.full((128, 64), 9, dtype=torch.uint8), torch.ones(128, 2), None, 2, "symmetric")
x, backend.WORK = torch.ones(16, 256), 1
expected = backend.multiply(x, packed, 2)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(backend.multiply(x, packed, 2), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# The choice


@pytest.fixture
def fresh(fresh_backends):
    """Forget all verdicts and compiled kernels, before and after."""
    caches = (cpu_backend.instruction, ir_text.compiled)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def error(precision, dtype):
    """Of a product, relative to float64."""
    packed = random_packed(128, 256)
    x = torch.randn(80, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ dequantize(packed, dtype).double().t()
    out = backends.multiply(x, packed, Setting("auto", precision))
    return float((out.double() - exact).norm() / exact.norm())


def test_the_cpu_backend_is_chosen_and_logged_once(fresh, caplog, monkeypatch):
    """With the error of each precision, in BF16 and FP32, whichever way is the fastest."""
    caplog.set_level("INFO")
    for first in (0, -1):
        monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_, first=first: ways[first - (len(ways) > 1)])
        assert error("auto", torch.bfloat16) < 0.003 and error("exact", torch.bfloat16) < 0.003
        assert error("auto", torch.float32) < 3e-4 and error("exact", torch.float32) < 1e-6
        assert error("fast", torch.float32) < 0.008
    monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[0])
    assert 0.003 < error("fast", torch.bfloat16) < 0.008 or not INT8
    assert caplog.text.count(f"compiled for {KINDS[0]}") == 1


@pytest.mark.parametrize(("broken", "said"), [
    ("missing", "llvmlite is not installed"), ("damaged", "fails on this machine"),
    ("refusing", "no such target"), ("wrong", "times the tolerance")])
def test_without_a_working_llvmlite_torch_takes_over(fresh, caplog, monkeypatch, broken, said):
    caplog.set_level("INFO")
    if broken == "missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif broken == "damaged":
        def fail():
            raise OSError("libllvmlite.so: cannot open shared object file")
        monkeypatch.setattr(kernels, "kinds", fail)
    elif broken == "refusing":
        def refuse(*_args, **_constants):
            raise RuntimeError("no such target")
        monkeypatch.setattr(kernels, "function", refuse)
    else:
        for module in (kernels, products):
            monkeypatch.setattr(module, "LEVELS", {1: (1, 1), 2: (2, 1), 4: (1, 7)})
    for precision in ("exact", "fast"):
        choice = backends.choose(Setting("auto", precision), CPU, 4608, random_packed(128, 256), torch.bfloat16)
        assert str(choice) == "torch"
        assert error(precision, torch.bfloat16) < 0.003
    assert said in caplog.text


def windows_calls(text: str, cpu: str, features: str) -> list[str]:
    """What a kernel calls on 64-bit Windows, where a frame above 4 KB calls ``__chkstk``, which LLVM's JIT lacks."""
    machine = llvm.Target.from_triple("x86_64-pc-windows-msvc").create_target_machine(
        cpu=cpu or "x86-64-v3", features=features if cpu else "", opt=3)
    module, passes = llvm.parse_assembly(text), llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    module.triple = machine.triple
    return re.findall(r"\bcallq?\s.*", machine.emit_assembly(module))


@pytest.mark.skipif(not INT8, reason="not an x86 CPU that has int8 kernels")
def test_kernels_call_nothing_on_windows(fresh, monkeypatch):
    seen, target, build = [], ir_text.target, ir_text.build
    monkeypatch.setattr(ir_text, "target", lambda *args: seen.append(args) or target(*args))
    monkeypatch.setattr(ir_text, "build", lambda text, *rest: seen.append((text, *seen.pop())) or build(text, *rest))
    for kind in KINDS:
        monkeypatch.setattr(cpu_backend, "instruction", lambda kind=kind: kind)
        for precision in ("exact", "fast") if kind in INT8 else ("exact",):
            backends.multiply(torch.randn(80, 256), random_packed(128, 256), Setting("cpu", precision))
    assert len(seen) > len(KINDS) and not [calls for kernel in seen if (calls := windows_calls(*kernel))]
    big = "define void @kernel() { %a = alloca [5000 x i8] call void asm sideeffect \"\", \"r\"(ptr %a) ret void }"
    assert windows_calls(big, "", ""), "a large frame would show"
