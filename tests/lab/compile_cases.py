"""Compile our kernels for the architectures given (80, 90, gfx1100 ...), with no GPU, and print one line of JSON for
each: name, architecture, bytes of shared memory and of machine code, int8 matrix instructions, and how many fused
multiply-adds in FP32."""

import json
import re
import sys

import torch  # noqa: F401 (before triton)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bonsai_image.ops import triton_kernels as kernels

#: Name: kernel, types of its arguments, constants, options of the launch (as in ops/triton_kernels.py).
CASES = {}
for bits, form, group in ((1, "symmetric", 128), (2, "symmetric", 128), (4, "affine", 64), (4, "zeropoint", 64),
                          (2, "levels", 128), (1, "levels", 128)):
    step, origin = kernels.LEVELS[bits]
    CASES[f"expand-{bits}-{form}"] = (
        kernels._expand,
        {"codes": "*u8", "scale": "*fp32", "shift": "*fp32", "out": "*i8" if form == "levels" else "*bf16",
         "total": "i32"},
        {"GROUP_BYTES": group * bits // 8, "BITS": bits, "FORM": form, "STEP": step, "ORIGIN": origin,
         "BLOCK": kernels.EXPAND_BYTES},
        kernels.EXPAND_LAUNCH)
CASES["quantise-rows"] = (
    kernels._quantise_rows, {"x": "*bf16", "q": "*i8", "row": "*fp32", "k": "i32", "stride": "i32"},
    {"BLOCK": 16384}, kernels.ROWS_LAUNCH)
CASES["int8-matmul"] = (
    kernels._int8_matmul,
    {"q": "*i8", "row": "*fp32", "levels": "*i8", "scale": "*bf16", "out": "*bf16", "m": "i32", "n": "i32", "k": "i32",
     "stride": "i32"},
    {"GROUP": 128, "BLOCK_M": kernels.TILE_M, "BLOCK_N": kernels.TILE_N, "ROWS": kernels.TILE_ROWS},
    kernels.MATMUL_LAUNCH)

for arch in sys.argv[1:]:
    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if arch.startswith("gfx") else GPUTarget(
        "cuda", int(arch), 32)
    for name, (kernel, types, constants, options) in CASES.items():
        names = kernel.arg_names
        # What the launcher finds out at run time: pointers and strides are multiples of 16, the number of rows is not.
        attrs = {(names.index(arg),): [["tt.divisibility", 16]] for arg in types if arg != "m"}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")},
                           {(names.index(arg),): value for arg, value in constants.items()}, attrs)
        compiled = compile(source, target=target, options=options)
        binary, listing = ("cubin", "ptx") if target.backend == "cuda" else ("hsaco", "amdgcn")
        listing = compiled.asm[listing]
        print(json.dumps({"name": name, "arch": arch, "shared": compiled.metadata.shared,
                          "code": len(compiled.asm[binary]),
                          "fma": len(re.findall(r"fma\.rn\.f32|v_(?:pk_)?fma\w*f32", listing)),
                          "matrix": sorted(set(re.findall(
                              r"(?:wgmma|mma)\.\S*s8\S*|tcgen05\.mma\S*|v_(?:mfma|wmma)_i32\w*", listing)))}),
              flush=True)
