"""MLX against torch on the CPU, in float32 (on a CPU MLX accumulates half types in half precision)."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bonsai_image.loaders import Transformer
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.miniature import demo
from bonsai_image.ops import Setting, backends, linear
from bonsai_image.ops.backends import choose
from bonsai_image.ops.packed import is_packed, packed_nbytes, packed_weight, unwrap
from bonsai_image.standalone import generate as generating
from bonsai_image.standalone import models
from bonsai_image.standalone.generate import Compute, complete_repository, generate
from bonsai_image.standalone.models import MlxTransformer, transformer_module
from bonsai_image.tests.support.random_model import random_transformer
from bonsai_image.tests.support.reference import dense64, random_weight, relative

mx = pytest.importorskip("mlx.core")
from bonsai_image.networks import klein_mlx as mlx_klein  # noqa: E402
from bonsai_image.ops.backends.mlx import arrays as mlx_arrays  # noqa: E402

CPU = torch.device("cpu")
MLX, TORCH = Setting("mlx", "exact"), Setting("torch", "exact")
TOLERANCE = 1e-5
SMALL = KleinConfig(num_attention_heads=2, joint_attention_dim=384, in_channels=32, out_channels=32, num_layers=2,
                    num_single_layers=2)
TINY = KleinConfig(num_attention_heads=1, joint_attention_dim=64, in_channels=16, out_channels=16, num_layers=1,
                   num_single_layers=1)


@pytest.fixture(autouse=True)
def mlx_is_used():
    """Without this, a defect that the self-check finds would let torch pass every test in MLX's stead."""
    weight = unwrap(random_weight(2, "symmetric", 64, 256, 128))
    assert choose(MLX, CPU, 4608, weight, torch.float32).backend.NAME == "mlx"


def model(config: KleinConfig, bits: int) -> Transformer:
    """A random model whose norms are not all ones, so that a forgotten or misplaced norm shows."""
    generator = torch.Generator().manual_seed(bits)
    tensors = random_transformer(config, bits, generator)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = torch.rand(tensor.shape, generator=generator).add(0.5).bfloat16()
    return Transformer(Path("random"), "mlx", tensors, config)


def inputs(config: KleinConfig, batch: int, height: int, width: int, references=(), text: int = 7) -> dict:
    """The arguments of diffusers' forward, reference latents behind the image at times 10, 20, ..."""
    generator = torch.Generator().manual_seed(batch)
    ids = [torch.cartesian_prod(torch.tensor([10 * i]), torch.arange(h), torch.arange(w), torch.arange(1))
           for i, (h, w) in enumerate([(height, width), *references])]
    ids = torch.cat(ids)
    return {
        "hidden_states": torch.randn(batch, len(ids), config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": ids,
        "txt_ids": torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(text)),
    }


# One product


@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 5, 512), (67, 512)])
@pytest.mark.parametrize(("bits", "form", "group"), [
    (1, "symmetric", 128), (2, "symmetric", 128), (4, "symmetric", 128), (2, "affine", 128), (4, "affine", 64),
    (4, "affine", 32)])
def test_linear_equals_the_reference(bits, form, group, shape):
    weight = random_weight(bits, form, 320, 512, group)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(320, generator=torch.Generator().manual_seed(2)).bfloat16()
    result = linear(x, weight, bias, MLX)
    assert result.shape == (*shape[:-1], 320) and result.dtype == x.dtype
    assert relative(result, x.double() @ dense64(weight).T + bias) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_in_their_dtype(dtype):
    weight, x = random_weight(2, "symmetric", 320, 512, 128), torch.randn(3, 512).to(dtype)
    (packed,) = mlx_arrays.weight_arrays([unwrap(weight)], dtype)
    (rows,) = mlx_arrays.to_mlx([x])
    # Scales in another dtype than the activations would silently give float32.
    assert mlx_arrays.product(rows, packed).dtype == rows.dtype == mlx_arrays.DTYPES[dtype]
    assert linear(x, weight, None, MLX).dtype == dtype


def test_words_are_the_canonical_codes():
    weight = random_weight(2, "symmetric", 320, 512, 128)
    (packed,) = mlx_arrays.weight_arrays([unwrap(weight)], torch.float32)
    assert np.array_equal(np.array(packed.words).view(np.uint8), unwrap(weight).codes.numpy())


@pytest.fixture
def no_mlx_product(monkeypatch):
    def refuse(*args):
        pytest.fail("MLX was used")  # raises no Exception, which would be taken for a failure of MLX

    monkeypatch.setattr(mlx_arrays, "multiply", refuse)


def test_torch_multiplies_zero_points(no_mlx_product):
    weight, x = random_weight(4, "zeropoint", 320, 512, 64), torch.randn(3, 512)
    assert torch.equal(linear(x, weight, None, MLX), linear(x, weight))


def test_gradients():
    weight, x = random_weight(2, "symmetric", 320, 512, 128), torch.randn(3, 512, requires_grad=True)
    linear(x, weight, None, MLX).sum().backward()
    assert relative(x.grad, dense64(weight).sum(0).expand(3, -1)) < TOLERANCE


def test_torch_multiplies_float64_and_no_rows(no_mlx_product):
    weight = random_weight(2, "symmetric", 320, 512, 128)
    assert linear(torch.randn(3, 512).double(), weight, None, MLX).dtype == torch.float64
    assert linear(torch.empty(0, 512), weight, None, MLX).shape == (0, 320)


# The crossing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_crossing_there_and_back(dtype, shared, monkeypatch):
    if not shared:
        def refuse(array):
            raise BufferError("device type 8")

        monkeypatch.setattr(torch, "from_dlpack", refuse)
    x = torch.randn(3, 4, 5).to(dtype).transpose(0, 2)
    (array,) = mlx_arrays.to_mlx([x])
    assert torch.equal(mlx_arrays.to_torch(array, x), x)
    assert torch.equal(mlx_arrays.to_torch(array.transpose(1, 0, 2), x), x.transpose(0, 1))


def test_a_step_crosses_twice(monkeypatch):
    crossings = []
    for name in ("to_mlx", "to_torch"):
        original = getattr(mlx_arrays, name)
        monkeypatch.setattr(mlx_arrays, name,
                            lambda *args, name=name, original=original: crossings.append(name) or original(*args))
    module = MlxTransformer(model(TINY, 2), CPU, torch.float32)
    crossings.clear()
    module(**inputs(TINY, 1, 2, 2))
    assert crossings == ["to_mlx", "to_torch"]


# The whole transformer


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(("batch", "height", "width", "references"), [
    (1, 4, 4, ()), (2, 7, 5, ()), (1, 1, 3, ()), (1, 5, 3, ((3, 4),)), (2, 3, 5, ((2, 3), (4, 1)))])
def test_transformer_equals_diffusers(bits, batch, height, width, references):
    loaded, arguments = model(SMALL, bits), inputs(SMALL, batch, height, width, references)
    reference = transformer_module(loaded, CPU, torch.float32, TORCH)
    with torch.inference_mode():
        expected = reference(**arguments, return_dict=False)[0]
        result = MlxTransformer(loaded, CPU, torch.float32)(**arguments)[0]
    assert relative(result, expected) < TOLERANCE


def test_rotary_tables_at_far_positions():
    """In float32 an angle of 1234 radians would be off by up to 7e-5."""
    ids = torch.tensor([[70, 1234, 999, 511], [0, 3, 1, 0]])
    cos, sin = mlx_klein.rotary_tables(ids, mlx_klein.ROPE_AXES, mlx_klein.ROPE_THETA)
    angles = np.concatenate([ids.numpy()[:, i, None] * 2000.0 ** (-np.arange(16) / 16) for i in range(4)], axis=1)
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 1e-7 and np.abs(sin.numpy() - np.sin(angles)).max() < 1e-7


def test_the_embedded_host_uses_it_where_every_layer_can():
    loaded = model(TINY, 2)
    assert isinstance(transformer_module(loaded, CPU, torch.float32, MLX), MlxTransformer)
    name = "transformer_blocks.0.attn.to_q.weight"
    weight = loaded.tensors[name]
    loaded.tensors[name] = packed_weight(unwrap(weight).codes, unwrap(weight).scale, 2, "zeropoint",
                                         torch.ones_like(unwrap(weight).scale))
    mixed = transformer_module(loaded, CPU, torch.float32, MLX)
    assert not isinstance(mixed, MlxTransformer)
    arguments = inputs(TINY, 1, 2, 3)
    with torch.inference_mode():
        expected = transformer_module(loaded, CPU, torch.float32, TORCH)(**arguments, return_dict=False)[0]
        assert relative(mixed(**arguments, return_dict=False)[0], expected) < TOLERANCE


@pytest.mark.parametrize("argument", [{"guidance": torch.ones(1)}, {"joint_attention_kwargs": {"scale": 0.5}},
                                      {"return_dict": True}])
def test_the_embedded_host_refuses_what_it_lacks(argument):
    with pytest.raises(ValueError, match="MLX transformer"):
        MlxTransformer(model(TINY, 2), CPU, torch.float32)(**inputs(TINY, 1, 2, 2), **argument)


def test_float16_overflow_is_clamped():
    """A block that overflows leaves the largest number behind, as in both hosts, not an infinity that turns NaN."""
    loaded, arguments = model(TINY, 2), inputs(TINY, 1, 2, 2)
    name = "single_transformer_blocks.0.attn.to_out.weight"
    weight = loaded.tensors[name]
    loaded.tensors[name] = packed_weight(unwrap(weight).codes, unwrap(weight).scale * 60000, 2)
    arguments = {key: value.half() if value.is_floating_point() else value for key, value in arguments.items()}
    result = MlxTransformer(loaded, CPU, torch.float16)(**arguments)[0]
    assert result.dtype == torch.float16 and bool(result.isfinite().all())


def test_cancelling_after_each_block():
    loaded, arguments, seen = model(SMALL, 2), inputs(SMALL, 1, 2, 2), []
    weights = mlx_klein.load(to_comfyui(loaded.tensors), torch.float32)
    mlx_klein.step(weights, arguments["hidden_states"], arguments["img_ids"], arguments["encoder_hidden_states"],
                   arguments["txt_ids"], arguments["timestep"], after_block=lambda: seen.append(None))
    assert len(seen) == SMALL.num_layers + SMALL.num_single_layers


def test_threads():
    """Load in one thread, run in two others, 100 alternations."""
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        module = loader.submit(MlxTransformer, model(TINY, 1), CPU, torch.float32).result()
        weight, arguments = random_weight(2, "symmetric", 320, 512, 128), inputs(TINY, 1, 1, 2, text=2)
        expected = [pool.submit(lambda: module(**arguments)[0]).result() for pool in (first, second)]
        assert torch.equal(*expected)
        for i in range(100):
            pool = (first, second)[i % 2]
            assert torch.equal(pool.submit(lambda: module(**arguments)[0]).result(), expected[0])
            x = torch.randn(2, 512)
            assert relative(pool.submit(linear, x, weight, None, MLX).result(),
                            linear(x, weight)) < TOLERANCE


def test_one_weight_that_mlx_does_not_take_leaves_all_to_torch(monkeypatch):
    weights = [random_weight(2, "symmetric", 64, 256, 128), random_weight(4, "zeropoint", 64, 256, 64)]
    assert backends.only("mlx", MLX, CPU, weights[:1], torch.float32)
    assert not backends.only("mlx", MLX, CPU, weights, torch.float32)
    assert not backends.only("mlx", MLX, CPU, [], torch.float32)
    monkeypatch.setattr(backends, "choose", None)
    assert not backends.only("mlx", MLX, torch.device("cuda"), weights, torch.float32), "nothing checked"


@pytest.mark.parametrize("part", ["step", "load"])
def test_where_mlx_fails_torch_computes(monkeypatch, caplog, part):
    def fail(*args, **kwargs):
        calls.append(part)
        raise AttributeError("module 'mlx.core' has no attribute 'fast'")

    calls, loaded, arguments = [], model(SMALL, 2), inputs(SMALL, 1, 2, 2)
    monkeypatch.setattr(mlx_klein, part, fail)
    module = transformer_module(loaded, CPU, torch.float32, MLX)
    with torch.inference_mode():
        expected = transformer_module(loaded, CPU, torch.float32, TORCH)(**arguments, return_dict=False)[0]
        for _ in range(2):
            assert relative(module(**arguments)[0], expected) < TOLERANCE
    assert calls == [part] and caplog.text.count("(AttributeError: module 'mlx.core' has no attribute") == 1


# Memory


@pytest.mark.parametrize("setting", [MLX, TORCH])
def test_each_model_is_gone_before_the_next_is_used(repository, monkeypatch, setting):
    """Neither torch nor MLX still holds any of the text encoder, in memory or in MLX's cache, nor the transformer."""
    seen, before = [], mx.get_active_memory()
    for part, real in (("text_encoder_module", models.text_encoder_module),
                       ("transformer_module", models.transformer_module)):
        def build(*args, real=real, **options):
            assert all(each() is None for each in seen)
            assert mx.get_active_memory() - before < 1e5 and mx.get_cache_memory() == 0
            module = real(*args, **options)
            seen.append(weakref.ref(module))
            return module

        monkeypatch.setattr(models, part, build)

    def decode(*args, real=generating.decode):
        assert [each() for each in seen] == [None, None]
        return real(*args)

    monkeypatch.setattr(generating, "decode", decode)
    generate(complete_repository(repository), ["a bonsai"], Compute(CPU, torch.float32, setting), 32, 32, steps=1,
             progress=False)


def test_what_mlx_adds_to_the_weights():
    """Beside codes, scales and dense weights as they are stored: one table of biases, 1/128 of the weights."""
    tensors = to_comfyui(model(SMALL, 2).tensors)
    stored = sum(packed_nbytes(t) if is_packed(t) else t.nbytes for t in tensors.values())
    weights = mlx_klein.load(tensors, torch.bfloat16)
    held = sum(sum(part.nbytes for part in weight[:3]) if isinstance(weight, tuple) else weight.nbytes
               for weight in weights.values())
    assert held - stored == sum(2 * t.numel() // 128 for t in tensors.values() if is_packed(t))


# Images


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_it_draws_the_same_images(variant):
    repository, images = complete_repository(demo.MINIATURE / "ternary"), []
    for backend in ("torch", "mlx"):
        result = generate(repository, demo.PROMPTS, Compute(CPU, torch.float32, Setting(backend)), demo.SIDE,
                          demo.SIDE, model=demo.load(variant), progress=False)
        assert (result.settings["backend"], result.settings["variant"]) == (backend, variant)
        images.append(np.stack(result.images).astype(int))
    assert images[0].std() > 10
    assert np.abs(images[0] - images[1]).max() <= 1
