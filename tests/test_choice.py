"""The choice among the ways to multiply, as pure logic, and how it meets ``ops/backends.py``."""

from __future__ import annotations

import pytest
import torch

from bonsai_image.ops import accelerator, backends
from bonsai_image.ops.choice import Card, candidates, gemlite_problem, gemlite_refusal, int8_refusal
from bonsai_image.ops.packed import packed_weight

HOPPER = Card("nvidia", "NVIDIA H200", (9, 0))
TURING = Card("nvidia", "NVIDIA GeForce RTX 2080", (7, 5))
RADEON = Card("amd", "AMD Radeon RX 7900 XTX")
ARC = Card("intel", "Intel Arc A770")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def ways(policy="triton", card=HOPPER, rows=4608, n=3072, k=3072, dtype=torch.bfloat16, bits=2, form="symmetric",
         group=128, **kwargs):
    return candidates(policy, card, rows, n, k, dtype, bits, form, group, **kwargs)


def test_an_image_is_expanded_and_multiplied():
    # 512 text tokens alone, a prompt, 512 x 512 and 1024 x 1024 pixels.
    for rows in (512, 1024, 1536, 4096, 4608):
        assert ways(rows=rows) == ("triton", "torch")
        assert ways(rows=rows, bits=4, form="affine", group=64) == ("triton", "torch")


def test_few_rows_go_to_gemlite_first():
    assert ways(rows=64) == ("gemlite", "triton", "torch")
    assert ways(rows=65) == ("triton", "torch")
    # Where the out features do not fill GemLite's tiles it would read beyond the scales.
    assert ways(rows=64, n=3000) == ("triton", "torch")


def test_a_measured_card_has_its_own_limit():
    table = {HOPPER.name: 256}
    assert ways(rows=256, table=table)[0] == "gemlite"
    assert ways(rows=257, table=table)[0] == "triton"
    assert ways(rows=256, card=RADEON, table=table)[0] == "triton"


def test_int8_only_where_asked_for_and_possible():
    assert ways("int8") == ("int8", "triton", "torch")
    assert ways("int8", rows=64)[0] == "gemlite"
    assert "int8" not in ways("triton")
    # Which card can is for the refusal to say (below), so that the log names the reason.
    assert ways("int8", card=TURING) == ("int8", "triton", "torch")
    assert ways("int8", bits=4, form="affine", group=64) == ("triton", "torch")
    assert ways("int8", group=48) == ("triton", "torch")


def test_gemlite_by_name_for_any_rows_that_it_can_count():
    assert ways("gemlite") == ("gemlite", "triton", "torch")
    # 16 and 17 pictures of 1024 x 1024 at once through the widest layer.
    assert ways("gemlite", rows=16 * 4608, n=27648)[0] == "gemlite"
    assert ways("gemlite", rows=17 * 4608, n=27648) == ("triton", "torch")
    assert ways("gemlite", rows=17 * 4608 * 9 // 4, k=12288) == ("triton", "torch")


def test_other_dtypes_stay_with_torch():
    assert ways(dtype=torch.float64) == ("torch",)


@pytest.mark.parametrize(("card", "gemlite", "triton", "said"), [
    (HOPPER, "0.6.0.post2", "3.9.0", None),
    (HOPPER, "0.6.0", "3.6.0", None),
    (HOPPER, "0.5.1.post1", "3.7.1", None),
    (HOPPER, None, "3.9.0", "gemlite is not installed"),
    (HOPPER, "0.5.1.post1", "3.8.0", "gemlite 0.5.1.post1 does not work with triton 3.8.0"),
    (HOPPER, "0.5.1", "3.10.0", "gemlite 0.5.1 does not work with triton 3.10.0"),
    (HOPPER, "0.6.0", "3.5.1", "gemlite 0.6.0 needs triton 3.6 or newer, found 3.5.1"),
    (TURING, "0.6.0", "3.9.0", "sm_75"),
    (RADEON, "0.6.0", "3.9.0", "RX 7900 XTX"),
])
def test_what_gemlite_cannot_serve_is_refused_by_name(card, gemlite, triton, said):
    reason = gemlite_refusal(card, gemlite, triton)
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(("gemlite", "triton", "said"), [
    ("0.6.0", "3.9.0", None),
    (None, "3.9.0", "gemlite is not installed (pip install gemlite,"),
    ("0.6.0", None, "on Windows pip install triton-windows"),
    ("0.6.0", "3.5.1", "update PyTorch"),
    ("0.5.1", "3.8.0", "update it (pip install --upgrade gemlite)"),
])
def test_what_is_installed_is_judged_without_a_card(gemlite, triton, said):
    reason = gemlite_problem(gemlite, triton)
    assert reason is None if said is None else said in reason


def test_int8_is_refused_by_name():
    assert int8_refusal(HOPPER) is None
    assert "sm_75" in int8_refusal(TURING)
    assert "Arc A770" in int8_refusal(ARC)


def test_refusals_are_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(accelerator, "card", lambda _device: TURING)
    with caplog.at_level("INFO"):
        for _ in range(3):
            assert not accelerator.works("int8", CUDA, 2, "symmetric", 128, torch.float16, torch.bfloat16)
    accelerator._refusal.cache_clear()
    accelerator._check.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Bonsai Image: int8 activations need an Ampere card or newer, NVIDIA GeForce RTX 2080 is sm_75."]


@pytest.mark.parametrize(("backend", "precision", "device", "triton", "resolved"), [
    ("auto", "exact", CUDA, True, "triton"),
    ("auto", "fast", CUDA, True, "int8"),
    ("triton", "fast", CUDA, True, "int8"),
    ("gemlite", "exact", CUDA, True, "gemlite"),
    ("torch", "exact", CUDA, True, "torch"),
    ("auto", "exact", torch.device("xpu", 0), True, "triton"),
    ("auto", "exact", CUDA, False, "torch"),
    ("auto", "fast", CUDA, False, "torch"),
    ("triton", "exact", CPU, True, "torch"),
    ("auto", "fast", CPU, True, "torch"),
    ("gemlite", "exact", CPU, True, "torch"),
])
def test_backends_resolve(monkeypatch, backend, precision, device, triton, resolved):
    monkeypatch.setattr(accelerator, "TRITON_INSTALLED", triton)
    assert backends.resolve(backends.select(backend, precision), device) == resolved


@pytest.mark.parametrize(("backend", "precision", "installed", "resolved"), [
    ("auto", "exact", True, "mlx"),
    ("auto", "fast", True, "mlx"),
    ("mlx", "exact", True, "mlx"),
    ("torch", "exact", True, "torch"),
    ("auto", "exact", False, "torch"),
    ("auto", "fast", False, "torch"),
])
def test_backends_resolve_on_a_mac(monkeypatch, backend, precision, installed, resolved):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(backends.mlx_backend, "available", lambda: installed)
    assert backends.resolve(backends.select(backend, precision), torch.device("mps")) == resolved


@pytest.mark.parametrize("backend", ["torch", "gemlite"])
def test_fast_contradicts_an_exact_backend(backend):
    with pytest.raises(ValueError, match=backend):
        backends.select(backend, "fast")


@pytest.mark.parametrize("backend", [*backends.NAMES, "int8"])
def test_every_name_serves_on_a_cpu(backend):
    """A backend that the device cannot have does not fail: torch serves."""
    weight = packed_weight(torch.full((4, 32), 0b10011100, dtype=torch.uint8), torch.ones(4, 1), 2)
    x = torch.arange(128.0)[None]
    assert torch.equal(backends.linear(x, weight, None, backend), x @ weight.dequantize().float().t())
