"""Run GemLite's kernels through Triton's interpreter, as our backend calls them, against the reference; print one line
of JSON for every case: ``{"name", "error", "tolerance"}``."""

import json

import interpreter  # noqa: F401 (first: it sets TRITON_INTERPRET)
import stub_device
import torch


def main() -> None:
    stub_device.install()
    from bonsai_image.ops.backends import gemlite_backend
    from bonsai_image.ops.packed import Packed, dequantize

    generator = torch.Generator().manual_seed(0)
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for bits, form, group in ((1, "symmetric", 128), (2, "symmetric", 128), (4, "symmetric", 64), (4, "affine", 64),
                              (4, "zeropoint", 64)):
        for name, dtype in dtypes.items():
            # GemLite's kernel for few rows, and its GEMM.
            for rows in (5, 80):
                n, k = 128, 512
                codes = torch.randint(0, 256, (n, k * bits // 8), generator=generator, dtype=torch.uint8)
                scale = torch.randn(n, k // group, generator=generator).bfloat16()
                shift = None if form == "symmetric" else torch.randn(n, k // group, generator=generator).bfloat16()
                x = torch.randn(rows, k, generator=generator).to(dtype)
                packed = Packed(codes, scale, shift, bits, form)
                out = gemlite_backend.multiply(x, packed)
                assert out.dtype == dtype and out.shape == (rows, n)
                weight = dequantize(packed, dtype)
                expected = x.double() @ weight.double().t()
                error = float((out.double() - expected).norm() / expected.norm())
                tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
                print(json.dumps({"name": f"{bits}-{form}-{rows}-{name}", "error": error, "tolerance": tolerance}),
                      flush=True)
    from triton.runtime._allocation import NullAllocator, _allocator

    contained = isinstance(_allocator.get(), NullAllocator)
    print(json.dumps({"name": "allocator-untouched", "error": 0 if contained else 1, "tolerance": 0}))


if __name__ == "__main__":
    main()
