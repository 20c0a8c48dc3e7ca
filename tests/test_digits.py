"""The definition of products with int8 digits against float64: how far it is, and what its digits depend on."""

import pytest
import torch

from bonsai_image.ops.backends.interface import int8_product, quantize
from bonsai_image.ops.packed import Packed, dequantize

#: Name -> (columns, factor): outlying activations as trained transformers have them.
OUTLIERS = {"none": (0, 1), **{f"4 columns x{factor}": (4, factor) for factor in (10, 30, 300, 3000)},
            "20 columns x30": (20, 30), "60 columns x10": (60, 10), "300 columns x5": (300, 5)}


def layer(bits=2, form="symmetric", group=128, n=128, k=3072):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=generator, dtype=torch.uint8)
    scale, shift = torch.rand(2, n, k // group, generator=generator).add(0.5).bfloat16()
    return Packed(codes, scale, None if form == "symmetric" else shift, bits, form)


def activations(columns, factor, rows=64, k=3072):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[:columns]] *= factor
    return x


def error(x, packed, digits):
    expected = x.double() @ dequantize(packed, torch.float64).t()
    return float((int8_product(x, packed, digits).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_the_error_has_a_bound_whatever_the_outliers(outliers):
    """BF16 rounds its result by 1.7e-3; one digit loses up to 2e-2."""
    x, packed = activations(*OUTLIERS[outliers]), layer()
    assert error(x, packed, 2) < 3e-4
    assert error(x, packed, "adaptive") < 8e-3
    if outliers == "none":  # the step is 2.7 / 127 of the rms, its rounding 0.6 % of it
        assert not quantize(x, 128, "adaptive")[1].any() and 5e-3 < error(x, packed, 1) < 7e-3
    else:
        assert error(x, packed, 1) > error(x, packed, "adaptive")


@pytest.mark.parametrize(("bits", "form"), [(1, "symmetric"), (4, "symmetric"), (4, "affine"), (4, "zeropoint"),
                                            (2, "affine")])
def test_every_form_has_the_error_of_its_activations(bits, form):
    packed = layer(bits, form, 64)
    if form == "zeropoint":  # about the middle of the codes, as HQQ has it: else the shift is all there is
        packed.shift.add_(7)
    x = activations(4, 30)
    assert error(x, packed, 2) < 3e-4 and error(x, packed, "adaptive") < 1e-2


@pytest.mark.parametrize("digits", [1, 2, "adaptive"])
def test_a_row_is_rounded_by_itself(digits):
    """So that an image is the same alone and in any batch."""
    x = activations(4, 30)
    x[::2] = activations(0, 1)[::2]
    together = quantize(x, 128, digits)
    for row in (0, 1, 63):
        for part, alone in zip(together, quantize(x[row : row + 1], 128, digits), strict=True):
            assert torch.equal(part[row : row + 1], alone)
