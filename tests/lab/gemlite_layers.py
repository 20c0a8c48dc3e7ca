"""Pack weights with the real GemLite, on a machine without a GPU. Run as a script, in a process of its own.

    python gemlite_layers.py IN OUT

IN is a ``torch.save`` of ``{layer: (codes uint8 (N, K), scale (N, G), zero (N, G), bits)}``; OUT receives the merged
``state_dict()`` of one ``GemLiteLinearTriton`` per layer. Packing needs no kernel, so a device in name is enough.
"""

import sys

import stub_device
import torch


def main(source: str, target: str) -> None:
    stub_device.install()
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
