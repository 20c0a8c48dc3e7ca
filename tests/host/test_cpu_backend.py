"""The compiled CPU backend inside ComfyUI: chosen, named, right beside a LoRA, and stopped by a cancel."""

import threading
import time

import comfy.model_management
import pytest

from bonsai_image.nodes import models
from bonsai_image.nodes.models import describe
from bonsai_image.ops.backends import Setting
from bonsai_image.ops.backends.cpu import backend
from bonsai_image.tests.support.adapters import Maker, with_lora
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward, sample

pytest.importorskip("llvmlite")
FAST = Setting("auto", "fast")


@pytest.fixture
def products(monkeypatch):
    """Whether each product of the cpu backend had int8 activations."""
    seen, original = [], backend.multiply
    monkeypatch.setattr(backend, "multiply", lambda x, packed, fast: seen.append(fast) or original(x, packed, fast))
    return seen


def test_fast_beside_a_lora(transformer, dense_model, tensors, inputs, products):
    model, file = models.load_model(str(transformer), "fp32", FAST), Maker(tensors).file("lora")
    assert "backend cpu with int8 activations" in describe(model)
    expected, plain = host_forward(with_lora(dense_model, file), inputs), host_forward(dense_model, inputs)
    actual = host_forward(with_lora(model, file), inputs)
    assert products.count(True) > 0
    assert 1e-6 < relative(actual, expected) < 0.03 < relative(expected, plain)


def test_exact_by_default(packed_model, dense_model, inputs, products):
    assert "backend cpu\n" in describe(packed_model) + "\n"
    assert relative(host_forward(packed_model, inputs), host_forward(dense_model, inputs)) < 1e-5
    assert products and not any(products)


def test_the_text_encoder_of_4_bits(repository, products):
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "bf16")
    assert clip.encode_from_tokens(clip.tokenize("a bonsai")).isfinite().all()
    assert products and not any(products)


def test_cancel_stops_inside_a_step(transformer, monkeypatch):
    """ComfyUI asks before every linear; a step of a full-size image takes ten seconds and more, a linear half a one."""
    model = models.load_model(str(transformer), "fp32", FAST)
    sample(model)
    original, calls = backend.multiply, []

    def slow(x, packed, fast):
        calls.append(time.monotonic())
        time.sleep(0.1)
        return original(x, packed, fast)

    monkeypatch.setattr(backend, "multiply", slow)
    cancel = threading.Timer(0.25, comfy.model_management.interrupt_current_processing)
    cancel.start()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model)
    finally:
        cancel.join()
        comfy.model_management.interrupt_current_processing(False)
    assert 2 <= len(calls) <= 5
