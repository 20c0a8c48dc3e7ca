"""The float64 reference every backend and codec is held against, written for plainness and nothing else."""

import torch


def dense64(weight) -> torch.Tensor:
    """The dense float64 weight of a packed one, element by element from the definition in ops/packed.py."""
    params = weight._params
    # Some rows at a time: an embedding of 151,936 rows would take 16 GB.
    parts = [part.split(4096) for part in (weight._qdata, params.scale, params.scale if params.shift is None else
                                           params.shift)]
    return torch.cat([_rows(params, *part) for part in zip(*parts, strict=True)])


def _rows(params, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    element, bits = torch.arange(params.orig_shape[1]), params.bits
    byte = codes[:, element * bits // 8].long()
    code = ((byte >> (element * bits % 8)) % 2**bits).double()
    group = element // (len(element) // scale.shape[1])
    scale, shift = scale.double()[:, group], shift.double()[:, group]
    if params.form == "symmetric":
        return scale * {1: 2 * code - 1, 2: code - 1, 4: code - 8}[bits]
    return scale * code + shift if params.form == "affine" else scale * (code - shift)


def random_weight(bits: int, form: str, n: int, k: int, group: int, dtype=torch.bfloat16, seed: int = 0):
    """A packed weight with random codes, scales and shifts of ``dtype``."""
    from bonsai_image.ops.packed import packed_weight

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).to(dtype)
    shift = None if form == "symmetric" else torch.randn(n, k // group, generator=generator).to(dtype)
    return packed_weight(codes, scale, bits, form, shift, dtype)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expectation, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
