"""The compiled CPU backend inside ComfyUI: chosen, named, right beside a LoRA, and stopped by a cancel."""

import comfy.model_management
import pytest

from bonsai_image.nodes import models
from bonsai_image.nodes.models import describe
from bonsai_image.ops.backends import Setting, selfcheck
from bonsai_image.ops.backends.cpu import backend
from bonsai_image.tests.support.adapters import Maker, with_lora
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward, sample

pytest.importorskip("llvmlite")
FAST = Setting("auto", "fast")


@pytest.fixture
def products(monkeypatch):
    """The int8 digits of each product of the cpu backend, where the first way allowed is the fastest."""
    seen, original = [], backend.multiply
    monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[0])
    monkeypatch.setattr(backend, "multiply", lambda *args: seen.append(args[2]) or original(*args))
    return seen


def test_fast_beside_a_lora(transformer, dense_model, tensors, inputs, products):
    model, file = models.load_model(str(transformer), "fp32", FAST), Maker(tensors).file("lora")
    assert "backend cpu with int8 activations" in describe(model)
    expected, plain = host_forward(with_lora(dense_model, file), inputs), host_forward(dense_model, inputs)
    actual = host_forward(with_lora(model, file), inputs)
    assert products.count("adaptive") > 0
    assert 1e-6 < relative(actual, expected) < 0.03 < relative(expected, plain)


def test_exact_by_default(packed_model, dense_model, inputs, products):
    assert "backend cpu\n" in describe(packed_model) + "\n"
    assert relative(host_forward(packed_model, inputs), host_forward(dense_model, inputs)) < 1e-5
    assert products and not any(products)


def test_the_text_encoder_of_4_bits(repository, products, monkeypatch):
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "bf16")
    tokens = clip.tokenize("a bonsai")
    clip.encode_from_tokens(tokens)  # with the self-checks
    products.clear()
    exact = clip.encode_from_tokens(tokens)
    assert products and not any(products)
    monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[-1])
    products.clear()
    assert relative(clip.encode_from_tokens(tokens), exact) < 0.02 and set(products) == {2}


def test_cancel_stops_inside_a_step(transformer, monkeypatch):
    """ComfyUI asks before every linear; a step of a full-size image takes ten seconds and more, a linear half a one."""
    model = models.load_model(str(transformer), "fp32", FAST)
    sample(model)
    original, calls = backend.multiply, []

    def cancelled_in_the_third(x, packed, fast):
        calls.append(fast)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()
        return original(x, packed, fast)

    monkeypatch.setattr(backend, "multiply", cancelled_in_the_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model)
    assert len(calls) == 3
