"""Run our Triton kernels through the interpreter against plain torch, and print one line of JSON for every case:
``{"name", "error", "tolerance"}``. The error is a count of different bit patterns or a relative norm."""

import json

import interpreter  # noqa: F401 (first: it sets TRITON_INTERPRET)
import torch

from bonsai_image.ops import Setting, linear, unwrap
from bonsai_image.ops.backends import gemlite_backend, selfcheck
from bonsai_image.ops.backends.interface import int8_product, quantize
from bonsai_image.ops.backends.triton import backend as triton_backend
from bonsai_image.ops.backends.triton import kernels as triton_kernels
from bonsai_image.ops.devices import Gpu
from bonsai_image.ops.packed import Packed, dequantize, rewrap

GENERATOR = torch.Generator().manual_seed(0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: In the cases that take longest: every dtype, every number of digits.
DIGITS = {"bf16": ("adaptive",), "fp16": (1,), "fp32": (2,)}
BITS = {2: torch.int16, 4: torch.int32}


def weight(n, k, bits, group, form="symmetric", scale_dtype=torch.bfloat16):
    """A random packed weight."""
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=GENERATOR, dtype=torch.uint8)
    scale = torch.randn(n, k // group, generator=GENERATOR).to(scale_dtype)
    shift = None if form == "symmetric" else torch.randn(n, k // group, generator=GENERATOR).to(scale_dtype)
    return Packed(codes, scale, shift, bits, form)


def report(name, error, tolerance):
    print(json.dumps({"name": name, "error": float(error), "tolerance": tolerance}), flush=True)


def different(a, b):
    """Number of elements whose bits differ (so that -0 is not 0)."""
    return (a.contiguous().view(BITS[a.itemsize]) != b.contiguous().view(BITS[b.itemsize])).sum()


def relative(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


def dequantize_cases():
    # 37 x 384: no whole number of programs of the kernel.
    for bits, form, group in ((1, "symmetric", 128), (2, "symmetric", 128), (2, "symmetric", 64), (4, "symmetric", 64),
                              (4, "affine", 64), (4, "zeropoint", 64), (2, "affine", 128), (1, "affine", 128)):
        for scale_name, scale_dtype in DTYPES.items():
            for name, dtype in DTYPES.items():
                packed = weight(37, 384, bits, group, form, scale_dtype)
                out = triton_kernels.expand(packed, torch.empty(37, 384, dtype=dtype))
                report(f"dequantize-{bits}-{form}-{group}-{scale_name}-{name}",
                       different(out, dequantize(packed, dtype)), 0)
    # Twice a scale that FP16 holds only roughly: the scale is rounded first.
    packed = weight(37, 384, 2, 128, scale_dtype=torch.float32)
    packed.scale.mul_(1e-7)
    out = triton_kernels.expand(packed, torch.empty(37, 384, dtype=torch.float16))
    report("dequantize-subnormal", different(out, dequantize(packed, torch.float16)), 0)


def exact():
    for bits, form, group in ((1, "symmetric", 128), (2, "symmetric", 128), (4, "affine", 64), (4, "zeropoint", 64)):
        for name, dtype in DTYPES.items():
            packed = weight(300, 256, bits, group, form)
            x = torch.randn(5, 256, generator=GENERATOR).to(dtype)
            out = triton_backend.multiply(x, packed)
            report(f"exact-{bits}-{form}-{name}", relative(out, x @ dequantize(packed, dtype).t()), 0)
    # Cut in three row blocks: each product is the same as in one piece.
    packed = weight(300, 256, 2, 128)
    x = torch.randn(5, 256, generator=GENERATOR).bfloat16()
    out = triton_backend.multiply(x, packed, workspace=128 * 256 * 2)
    report("exact-in-blocks", relative(out, x @ dequantize(packed, torch.bfloat16).t()), 0)


def int8():
    for name, dtype in DTYPES.items():
        x = torch.randn(70, 384, generator=GENERATOR).to(dtype)
        x[3], x[4, 5], x[66, 300] = 0, 1000, 60
        for digits in DIGITS[name]:
            high, low, step = quantize(x, 128, digits)
            q, found, second = triton_kernels.quantize(x, 128, digits)
            wrong = (q[0] != high).sum() + (found.t() != step).sum()
            if digits != 1:
                wrong += (q[1] != low).sum()
            if digits == "adaptive":
                tiles = [part.amax(0) for part in low.view(70, 3, 128).ne(0).any(2).int().split(triton_kernels.TILE_M)]
                wrong += (second.t() != torch.stack(tiles)).sum()
            report(f"quantize-{digits}-{name}", wrong, 0)
    for bits in (1, 2, 4):
        packed = weight(70, 384, bits, 128)
        levels = triton_kernels.expand(packed, packed.codes.new_empty(70, 384, dtype=torch.int8))
        expected = dequantize(packed._replace(scale=torch.ones_like(packed.scale)), torch.float32)
        report(f"levels-{bits}", (levels != expected).sum(), 0)
    # The largest sums there are, on both sides of zero: still exact when they start at the bits of 1.5 * 2**23.
    rounded = torch.zeros(2, 1, 128, dtype=torch.int8), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int32)
    rounded[0][0] = 127
    for level in (-2, 2):
        for digits in (1, 2, "adaptive"):
            out = triton_kernels.int8_matmul(*rounded, torch.full((1, 128), level, dtype=torch.int8),
                                             torch.ones(1, 1), torch.empty(1, 1), digits)
            report(f"int8-largest-{level}-{digits}", abs(out.item() - 127 * 128 * 128 * level), 0)
    for bits, group, m, n in ((1, 128, 5, 70), (2, 128, 130, 140), (2, 64, 5, 70), (2, 32, 3, 9)):
        packed = weight(n, 2 * 128, bits, group)
        x = torch.randn(m, 2 * 128, generator=GENERATOR)
        x[0, 7] = x[-1, 200] = 40  # one row of each tile of rows has a second digit
        for name, dtype in DTYPES.items():
            for digits in DIGITS[name] if m > 100 else (1, 2, "adaptive"):
                out = triton_backend.multiply(x.to(dtype), packed, digits)
                # The sum over groups is rounded in FP32 in both; then the result to its dtype.
                tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
                report(f"int8-{bits}-{group}-{m}x{n}-{digits}-{name}",
                       relative(out, int8_product(x.to(dtype), packed, digits)), tolerance)


def operator():
    """The registered operator from end to end on a made-up GPU: choice, self-check, bias, shapes, gradient."""
    for module in (triton_backend, gemlite_backend):
        module.gpu, module.DEVICES = lambda _device: Gpu("nvidia", "stub", (8, 9)), ("cpu",)
    selfcheck.fastest = lambda ways, *_: ways[0]
    tensor = rewrap(weight(192, 256, 2, 128), torch.bfloat16)
    bias = torch.randn(192, generator=GENERATOR)
    x = torch.randn(2, 40, 256, generator=GENERATOR).bfloat16()
    expected = linear(x, tensor, bias, Setting("torch"))
    for setting in (Setting("triton"), Setting("gemlite"), Setting("auto", "fast")):
        out = linear(x, tensor, bias, setting)
        assert out.shape == (2, 40, 192)
        # GemLite finds no GPU in this process: its self-check fails, and the exact kernels take over.
        fast = setting.precision == "fast"
        report(f"operator-{setting.backend}-{setting.precision}", relative(out, expected), 0.012 if fast else 0)
        assert fast == bool((out != expected).any())
    report("operator-checks", len(selfcheck._VERDICTS) - 6, 0)
    report("operator-no-rows", linear(x[:0], tensor, None, Setting("triton")).shape != (0, 40, 192), 0)
    x.requires_grad_()
    grads = [torch.autograd.grad(linear(x, tensor, None, setting).float().sum(), x)[0]
             for setting in (Setting("triton"), Setting("torch"))]
    report("operator-gradient", relative(*grads), 0)
    graphs = []

    def keep(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(backend=keep, fullgraph=True, dynamic=True)
    def compiled(x):
        return linear(x, tensor, None, Setting("auto"))

    for m in (3, 40, 80):
        rows = torch.randn(m, 256, generator=GENERATOR).bfloat16()
        report(f"operator-compiled-{m}", relative(compiled(rows), linear(rows, tensor, None, Setting("torch"))), 0)
    # One call in one graph for any number of rows, on both sides of the choice.
    report("operator-graphs", graphs != [["bonsai_image.packed_linear.default"]], 0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (x.detach(), *unwrap(tensor), bias, "auto", "fast")
    torch.library.opcheck(torch.ops.bonsai_image.packed_linear.default, args, test_utils=tests)
    report("operator-check", 0, 0)


if __name__ == "__main__":
    dequantize_cases()
    exact()
    int8()
    operator()
