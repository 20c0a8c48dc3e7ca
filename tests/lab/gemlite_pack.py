"""Pack weights with the real GemLite, on a machine without a GPU. Run as a script, in a process of its own.

    python gemlite_pack.py IN OUT

IN is a ``torch.save`` of ``{layer: (codes uint8 (N, K), scale (N, G), zero (N, G), bits)}``; OUT receives the merged
``state_dict()`` of one ``GemLiteLinearTriton`` per layer. GemLite asks for a CUDA device when imported; a stub that
only names one satisfies it, since packing needs no kernel.
"""

import sys
from types import SimpleNamespace

import torch


class _Driver:
    utils = SimpleNamespace(get_device_properties=lambda _index: {"max_shared_mem": 101376, "multiprocessor_count": 1})

    def get_current_target(self):
        return SimpleNamespace(backend="cuda", arch=80, warp_size=32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, *_):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return lambda *_args, **_kwargs: [0.0, 0.0, 0.0]

    def is_active(self):
        return True


def main(source: str, target: str) -> None:
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="stub", multi_processor_count=1, major=8, minor=0, total_memory=1 << 30)
    import triton

    triton.runtime.driver.set_active(_Driver())
    from gemlite.core import DType, GemLiteLinearTriton

    merged = {}
    for layer, (codes, scale, zero, bits) in torch.load(source, weights_only=True).items():
        n, k = codes.shape
        linear = GemLiteLinearTriton(bits, group_size=k // scale.shape[1], in_features=k, out_features=n,
                                     input_dtype=DType.FP16, output_dtype=DType.FP16)
        linear.pack(codes, scale.float(), zero.float(), bias=None, packing_bitwidth=8)
        merged |= {f"{layer}.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    torch.save(merged, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
