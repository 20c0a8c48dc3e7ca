"""Compile our kernels for the architectures given (75, 80, gfx1100 ...), with no GPU, and print one line of JSON for
each: name, architecture, registers of a thread, bytes spilled to memory, bytes of shared memory and of machine code,
bytes of each vector store, int8 matrix instructions, fused multiply-adds in FP32, conversions of integers to FP32."""

import json
import re
import subprocess
import sys
import tempfile

import torch  # noqa: F401 (before triton)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bonsai_image.ops.backends.triton import kernels

_WORD = {1: "*u8", 2: "*i16", 4: "*i32"}
#: Architectures whose int8 product is never used: Triton has no int8 matrix kernels before Ampere.
EXACT_ONLY = ("75",)


def cases(arch: str) -> dict[str, tuple]:
    """Name -> kernel, types of its arguments, constants, options of the launch (as in triton/kernels.py)."""
    half = "*fp16" if arch in EXACT_ONLY else "*bf16"  # what the model computes in there
    found = {}
    for bits, form, group in ((1, "symmetric", 128), (2, "symmetric", 128), (4, "affine", 64), (4, "zeropoint", 64),
                              (2, "levels", 128), (1, "levels", 128)):
        step, origin = kernels.LEVELS[bits]
        found[f"expand-{bits}-{form}"] = (
            kernels._expand,
            {"words": _WORD[bits], "scale": "*bf16", "shift": "*bf16", "out": "*i8" if form == "levels" else half,
             "total": "i32"},
            {"GROUP_WORDS": group // 8, "BITS": bits, "FORM": form, "STEP": step, "ORIGIN": origin,
             "BLOCK": kernels.EXPAND_WORDS},
            kernels.EXPAND_LAUNCH)
    if arch in EXACT_ONLY:
        return {name: case for name, case in found.items() if not name.endswith("levels")}
    for digits in (1, 2, "adaptive"):
        found[f"quantize-{digits}"] = (
            kernels._quantize,
            {"x": half, "q": "*i8", "step": "*fp32", "second": "*i32", "m": "i32", "k": "i32", "groups": "i32",
             "stride": "i32", "tiles": "i32"},
            {"GROUP": 128, "GROUPS": 128, "BLOCK_M": kernels.TILE_M, "DIGITS": digits, "LARGEST": kernels.LARGEST,
             "SMALLEST": kernels.SMALLEST, "OUTLYING": kernels.OUTLYING},
            kernels.ROWS_LAUNCH)
        found[f"int8-{digits}"] = (
            kernels._int8_matmul,
            {"q": "*i8", "step": "*fp32", "second": "*i32", "levels": "*i8", "scale": "*bf16", "out": half, "m": "i32",
             "n": "i32", "k": "i32", "stride": "i32", "tiles": "i32"},
            {"GROUP": 128, "BLOCK_M": kernels.TILE_M, "BLOCK_N": kernels.TILE_N, "ROWS": kernels.TILE_ROWS,
             "DIGITS": digits},
            kernels.MATMUL_LAUNCH)
    return found


def cuda_resources(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    listing = compiled.asm["ptx"]
    stores = re.findall(r"st\.global\S*?\.(?:v(\d)\.)?b(\d+)", listing)
    return {"registers": int(used["REG"]), "spilled": int(used["STACK"]) + int(used["LOCAL"]),
            "code": len(compiled.asm["cubin"]), "stores": [int(n or 1) * int(bits) // 8 for n, bits in stores],
            "matrix": sorted(set(re.findall(r"(?:wgmma|mma)\.\S*s8\S*|tcgen05\.mma\S*", listing))),
            "fma": len(re.findall(r"fma\.rn\.f32", listing)),
            "converted": len(re.findall(r"cvt\.rn\.f32\.s32", listing))}


def amd_resources(compiled) -> dict:
    listing = compiled.asm["amdgcn"]

    def noted(name):
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", listing)))

    stores = re.findall(r"(?:global|buffer)_store_(?:dword(?:x(\d))?|b(\d+)|(?:byte|short|b8|b16)\S*)\s", listing)
    return {"registers": noted("vgpr_count"), "spilled": 4 * (noted("vgpr_spill_count") + noted("sgpr_spill_count")),
            "code": len(compiled.asm["hsaco"]),
            "stores": [int(bits) // 8 if bits else 4 * int(words or 1) for words, bits in stores],
            "matrix": sorted(set(re.findall(r"v_(?:mfma|wmma)_i32\w*", listing))),
            "fma": len(re.findall(r"v_(?:pk_)?fma\w*f32", listing)),
            "converted": len(re.findall(r"v_cvt_f32_i32", listing))}


def main() -> None:
    for arch in sys.argv[1:]:
        target = GPUTarget("cuda", int(arch), 32) if arch.isdigit() else GPUTarget(
            "hip", arch, 64 if arch.startswith("gfx9") else 32)
        for name, (kernel, types, constants, options) in cases(arch).items():
            names = kernel.arg_names
            # What the launcher finds out at run time: pointers and strides are multiples of 16, the number of rows is
            # not, nor the number of groups in a row.
            attrs = {(names.index(arg),): [["tt.divisibility", 16]] for arg in types
                     if arg not in ("m", "groups", "tiles")}
            source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")},
                               {(names.index(arg),): value for arg, value in constants.items()}, attrs)
            compiled = compile(source, target=target, options=options)
            resources = (cuda_resources if target.backend == "cuda" else amd_resources)(compiled)
            print(json.dumps({"name": name, "arch": arch, "shared": compiled.metadata.shared, **resources}), flush=True)


if __name__ == "__main__":
    main()
