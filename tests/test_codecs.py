"""Codecs: lossless both ways for any codes and shape, and as the formats define them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bonsai_image.loaders.formats import comfy, dense, gemlite, hqq, mlx
from bonsai_image.ops.packed import pack_codes, unpack_codes
from bonsai_image.tests.support.reference import dense64
from bonsai_image.tests.support.sound_files import to_4bit_u8

BITS = st.sampled_from([1, 2, 4])
SEED = st.integers(0, 2**31 - 1)


def random_codes(bits: int, n: int, words: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 4 * words), generator=generator, dtype=torch.uint8)


@given(BITS, st.integers(1, 9), st.integers(1, 9), SEED)
def test_mlx_words(bits, n, words, seed):
    codes = random_codes(bits, n, words, seed)
    mlx_words = mlx.to_words(codes)
    element = seed % (words * 32 // bits)
    word = int(mlx_words[0, element // (32 // bits)])
    assert (word >> (bits * (element % (32 // bits)))) % 2**bits == int(unpack_codes(codes, bits)[0, element])
    assert torch.equal(mlx.from_words(mlx_words), codes)


def test_mlx_words_of_an_unaligned_view():
    codes = random_codes(2, 3, 4, 0)
    unaligned = torch.cat((torch.zeros(1, dtype=torch.uint8), codes.flatten()))[1:].view(3, 16)
    assert torch.equal(mlx.from_words(mlx.to_words(unaligned)), codes)


@given(BITS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 32]), SEED)
def test_gemlite_words_are_the_transposed_codes(bits, n, words, width, seed):
    codes = random_codes(bits, n, words, seed)
    w_q = (codes if width == 8 else mlx.to_words(codes).view(torch.int32)).t().contiguous()
    assert w_q.shape == (codes.shape[1] * 8 // width, n) and w_q.is_contiguous()
    values = unpack_codes(codes, bits)
    k = seed % values.shape[1]
    per_word = width // bits
    word = int(w_q[k // per_word, n - 1]) % 2**width
    assert (word >> (bits * (k % per_word))) % 2**bits == int(values[n - 1, k])
    assert torch.equal(gemlite.from_w_q(w_q), codes)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([16, 64]), SEED)
def test_hqq_halves(n, groups, group, seed):
    n, k = 2 * n, groups * group
    codes = random_codes(4, n, k // 8, seed)
    w_q = to_4bit_u8(codes, group)
    values = unpack_codes(codes, 4).view(-1, group)
    assert torch.equal(w_q >> 4, values[: len(values) // 2]) and torch.equal(w_q & 15, values[len(values) // 2:])
    assert torch.equal(hqq.from_4bit_u8(w_q, n, k), codes)


@given(st.integers(1, 9), st.integers(1, 60), SEED)
def test_base3(n, quads, seed):
    k = 4 * quads
    values = torch.randint(0, 3, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes = pack_codes(values, 2)
    packed = comfy.to_base3(codes)
    assert packed.shape == (n, -(-k // 5))
    digits = [int(packed[0, i // 5]) // 3 ** (i % 5) % 3 for i in range(k)]
    assert digits == values[0].tolist()
    assert torch.equal(comfy.from_base3(packed, k), codes)


def test_base3_refuses_what_is_not_ternary():
    with pytest.raises(ValueError, match="code 3"):
        comfy.to_base3(torch.tensor([[0b11000000]], dtype=torch.uint8))
    for bytes_, k in (([243], 4), ([81], 4), ([0, 0], 4)):
        with pytest.raises(ValueError):
            comfy.from_base3(torch.tensor([bytes_], dtype=torch.uint8), k)


@given(st.sampled_from([1, 2]), st.integers(1, 6), st.integers(1, 3), st.sampled_from([8, 128]), SEED)
def test_dense_weights_in_the_alphabet_pack_exactly(bits, n, groups, group, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, groups, group)
    levels = torch.randint(-1, 2, shape, generator=generator) if bits == 2 else \
        torch.randint(0, 2, shape, generator=generator) * 2 - 1
    weight = (levels * (torch.rand(n, groups, 1, generator=generator) + 0.1).bfloat16()).view(n, -1)
    assert torch.equal(dense64(dense.from_dense(weight, bits, group)), weight.double())


@pytest.mark.parametrize(("value", "bits"), [(0.5, 2), (0.5, 1), (0.0, 1), (float("nan"), 2)])
def test_dense_weights_outside_it_are_refused_by_name(value, bits):
    weight = torch.ones(4, 256, dtype=torch.bfloat16)
    weight[2, 130] = value
    with pytest.raises(ValueError, match="row 2, group 1"):
        dense.from_dense(weight, bits, 128)


@pytest.mark.parametrize(("values", "dtype"), [
    ([1.0, 3.140625], torch.bfloat16), ([1.0, 0.333251953125], torch.float16), ([1.0, 1 / 3], torch.float32)])
def test_scales_narrow_only_where_exact(values, dtype):
    (narrowed,) = gemlite.narrow_scales(torch.tensor(values))
    assert narrowed.dtype == dtype
    assert torch.equal(narrowed.float(), torch.tensor(values))
