"""The packed weight as a tensor: what it refuses to be made of, its codes, its values, and what torch does to it."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_image.ops.linear import PackedEmbedding, PackedLinear, _parameter
from bonsai_image.ops.packed import (
    PackedLayout,
    dequantize,
    equal,
    is_packed,
    pack_codes,
    packed_nbytes,
    packed_weight,
    rewrap,
    unpack_codes,
    unwrap,
)
from bonsai_image.tests.support.reference import dense64, random_weight

BITS = st.sampled_from([1, 2, 4])
FORMS = [(2, "symmetric"), (4, "affine"), (4, "zeropoint")]
CODES, SCALE = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)


# Made of


@pytest.mark.parametrize(("words", "said"), [
    ({"bits": 3}, "bits must be 1, 2 or 4, got 3"),
    ({"form": "wrong", "shift": SCALE}, "form must be one of symmetric, affine, zeropoint, got 'wrong'"),
    ({"form": "affine"}, "the form affine needs a shift tensor"),
    ({"shift": SCALE}, "the form symmetric takes no shift tensor"),
    ({"codes": CODES.int()}, "codes must be uint8 of two dimensions, got torch.int32"),
    ({"codes": CODES.flatten()}, "two dimensions"),
    ({"scale": torch.ones(5, 2)}, "4 rows of 256 do not fit scales of shape (5, 2)"),
    ({"scale": torch.ones(4, 3)}, "do not fit scales of shape (4, 3)"),
    ({"scale": torch.ones(4)}, "do not fit scales of shape (4,)"),
    ({"scale": torch.ones(4, 0)}, "do not fit scales of shape (4, 0)"),
    ({"form": "affine", "shift": torch.ones(4, 1)}, "scale (4, 2) and shift (4, 1) differ in shape"),
])
def test_what_does_not_fit_is_refused(words, said):
    with pytest.raises(ValueError) as caught:
        packed_weight(**{"codes": CODES, "scale": SCALE, "bits": 2, **words})
    assert said in str(caught.value)


def test_shape_group_and_bytes():
    weight = random_weight(4, "affine", 6, 256, 64)
    assert is_packed(weight) and weight.shape == (6, 256) and weight.dtype == torch.bfloat16
    packed = unwrap(weight)
    assert (packed.n, packed.k, packed.group) == (6, 256, 64)
    assert packed_nbytes(weight) == 6 * 128 + 2 * 6 * 4 * 2


@pytest.mark.parametrize("room", ["loaders", "nodes", "ops", "standalone"])
def test_two_files_read_comfy_kitchens_private_fields(room):
    root = Path(__file__).parent.parent
    readers = {path.relative_to(root).as_posix() for path in (root / room).rglob("*.py")
               if re.search(r"\._(qdata|params|layout_cls)\b", path.read_text(encoding="utf-8"))}
    assert readers == ({"ops/packed.py", "ops/tensor.py"} if room == "ops" else set())


def test_only_our_layout_is_packed():
    assert not is_packed(None) and not is_packed(torch.ones(2, 2)) and not is_packed(torch.nn.Parameter(SCALE))


# Codes and values


@given(BITS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_unpack_reads_lsb_first_and_pack_inverts_it(bits, n, words, seed):
    codes = torch.randint(0, 256, (n, 4 * words), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    values = unpack_codes(codes, bits)
    row = int.from_bytes(bytes(codes[0].tolist()), "little")
    assert values[0].tolist() == [(row >> (bits * i)) % 2**bits for i in range(values.shape[1])]
    assert torch.equal(pack_codes(values, bits), codes)


@pytest.mark.parametrize(("values", "bits", "said"), [
    ([[0, 1, 2]], 2, "3 codes of 2 bits do not fill whole bytes"), ([[0] * 7], 1, "do not fill"),
    ([[0, 1, 2, 4]], 2, "code 4 does not fit 2 bits"), ([[0, 16]], 4, "code 16"), ([[2] + [0] * 7], 1, "code 2")])
def test_codes_that_do_not_fit_are_refused(values, bits, said):
    with pytest.raises(ValueError, match=said):
        pack_codes(torch.tensor(values, dtype=torch.uint8), bits)


@settings(max_examples=30)
@given(BITS, st.sampled_from(["symmetric", "affine", "zeropoint"]), st.sampled_from([8, 32, 128]),
       st.integers(0, 2**31 - 1))
def test_dequantization_follows_its_definition(bits, form, group, seed):
    weight = random_weight(bits, form, 5, 256, group, torch.float32, seed)
    exact = dense64(weight)
    assert torch.equal(dequantize(unwrap(weight), torch.float64), exact)
    assert torch.equal(weight.dequantize(), exact.float()) or form != "symmetric"
    assert float((weight.dequantize().double() - exact).abs().max()) <= 2**-22 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "form"), [(4, "symmetric"), (4, "affine"), (4, "zeropoint")])
def test_other_forms_are_computed_in_float32_and_rounded_once(bits, form, dtype):
    weight = random_weight(bits, form, 32, 256, 64, torch.float32)
    assert torch.equal(dequantize(unwrap(weight), dtype), dequantize(unwrap(weight), torch.float32).to(dtype))


def test_equal_sees_every_difference():
    a, b = (random_weight(2, "affine", 4, 256, 128) for _ in range(2))
    assert equal(a, b) and equal(a, rewrap(unwrap(b)._replace(scale=unwrap(b).scale.double()), torch.float16))
    unwrap(b).codes[1, 5] ^= 1
    assert not equal(a, b)
    b = random_weight(2, "affine", 4, 256, 128)
    unwrap(b).shift[3, 1] += 1
    assert not equal(a, b)
    assert not equal(a, rewrap(unwrap(a)._replace(form="zeropoint"), a.dtype))
    assert not equal(a, a[:3])


def test_a_float_weight_cannot_become_packed():
    with pytest.raises(NotImplementedError, match="without changing the model"):
        PackedLayout.quantize(torch.randn(4, 256))


# What torch does to it


@pytest.fixture(params=["no_grad", "inference_mode"], autouse=True)
def context(request):
    """Hosts run and move models in either."""
    with getattr(torch, request.param)():
        yield


def held(bits: int = 2, form: str = "symmetric", n: int = 12, dtype=torch.bfloat16, seed: int = 0):
    """A weight as a layer holds it."""
    return _parameter(random_weight(bits, form, n, 256, 64, dtype, seed))


ROWS = {"slice": lambda w: [w[3:9]], "step": lambda w: [w[::2]], "narrow": lambda w: [w.narrow(0, 2, 5)],
        "split": lambda w: w.split(5), "sizes": lambda w: w.split([3, 9]), "chunk": lambda w: w.chunk(3),
        "cat": lambda w: [torch.cat([w[6:], w[:6], w])], "negative": lambda w: [torch.cat([w, w], -2)]}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_rows_stay_packed(name, bits, form):
    weight = held(bits, form)
    results, expected = ROWS[name](weight), ROWS[name](dense64(weight))
    assert len(results) == len(expected)
    for result, rows in zip(results, expected, strict=True):
        assert is_packed(result) and result.dtype == weight.dtype
        assert torch.equal(dense64(result), rows)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_weight_made_elsewhere_stay_packed(name):
    """In inference mode, of a weight that was made outside; and the other way round."""
    for inside in (False, True):
        with torch.inference_mode(inside):
            weight = random_weight(2, "symmetric", 12, 256, 64)
        assert all(map(is_packed, ROWS[name](weight)))


def test_slices_are_views():
    weight = held()
    assert unwrap(weight[2:]).codes.data_ptr() == unwrap(weight).codes[2:].data_ptr()


@pytest.mark.parametrize("change", [
    lambda w: torch.cat([w, held(4, "affine")]), lambda w: torch.cat([w, w.dequantize()]),
    lambda w: torch.cat([w, w], 1), lambda w: w[:, :128], lambda w: w.chunk(2, 1)[0], lambda w: w.t()])
def test_everything_else_sees_the_dense_weight(change):
    weight = held()
    assert not is_packed(change(weight))
    assert torch.equal(change(weight)[:4, :4].float(), weight.t()[:4, :4].float() if change(weight).shape[0] == 256
                       else weight.dequantize()[:4, :4].float())


@pytest.mark.parametrize("move", [
    lambda w: w.to("cpu", torch.float16), lambda w: w.to(torch.device("cpu"), torch.float16, non_blocking=True),
    lambda w: w.to(dtype=torch.float16), lambda w: w.to("cpu").to(torch.float16),
    lambda w: w.to(device="cpu", dtype=torch.float16)])
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_moves_keep_it_packed_and_its_scales_exact(move, bits, form):
    weight = held(bits, form)
    moved = move(weight)
    assert is_packed(moved) and moved.dtype == torch.float16
    assert all(map(torch.equal, PackedLayout.get_plain_tensors(moved), PackedLayout.get_plain_tensors(weight)))


@pytest.mark.parametrize("change", [
    lambda w: w.add_(1), lambda w: w.mul_(torch.ones(256)), lambda w: w.sub_(w.dequantize()), lambda w: w.div_(2),
    lambda w: w.addcmul_(w.dequantize(), w.dequantize()), lambda w: w.lerp_(w.dequantize(), 0.5), lambda w: w.fill_(0),
    lambda w: w.zero_(), lambda w: w.normal_()])
def test_arithmetic_in_place_raises(change):
    weight = held()
    before = dense64(weight)
    with pytest.raises(NotImplementedError, match="cannot be changed in place"):
        change(weight)
    assert torch.equal(dense64(weight), before)


def test_augmented_assignment_raises():
    weight = held()
    with pytest.raises(NotImplementedError):
        weight += 1


# Copies


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), through_torch])  # noqa: S301
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_weights_and_layers_survive_copies(bits, form, duplicate):
    """Of comfy-kitchen's own tensors, all of these fail."""
    weight = random_weight(bits, form, 12, 256, 64)
    linear, table = PackedLinear(256, 12, bias=False), PackedEmbedding(12, 256)
    for layer in (linear, table):
        layer.load_state_dict({"weight": weight})
    expected = linear(torch.eye(256))
    bare, (linear, table) = duplicate(weight), duplicate(torch.nn.ModuleList([linear, table]))
    for made in (bare, linear.weight, table.weight):
        assert is_packed(made) and equal(made, weight) and made.dtype == weight.dtype
        assert unwrap(made).codes.data_ptr() != unwrap(weight).codes.data_ptr()
        assert isinstance(made, torch.nn.Parameter) == (made is not bare)
    with torch.inference_mode(False):
        linear.to("cpu").to(torch.float16)
    assert torch.equal(linear(torch.eye(256)), expected)


def test_a_copy_keeps_what_is_shared_shared():
    weight = held()
    assert type(weight).__name__ == "QuantizedTensor", "or ComfyUI would not pin its memory"
    first, second = copy.deepcopy([weight, weight])
    assert first is second


@pytest.mark.parametrize("change", [torch.nn.Parameter, torch.Tensor.detach, torch.Tensor.clone, torch.empty_like,
                                    lambda w: w.to(torch.float16), lambda w: w[2:], lambda w: w.to("cpu")])
def test_what_is_made_of_a_weight_is_of_its_class(change):
    """torch asks for it in ``nn.Parameter``, and what is made can be copied as well."""
    weight = random_weight(2, "symmetric", 12, 256, 64)
    assert type(change(weight)) is type(weight) and is_packed(copy.deepcopy(change(weight)))
