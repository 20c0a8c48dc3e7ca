"""Which backend is chosen for a product and for a device, and why."""

import importlib.util
import logging
import sys

import pytest
import torch

from bonsai_image.ops import backends, linear
from bonsai_image.ops.backends import AUTO, Setting, gemlite_backend, libraries, selfcheck
from bonsai_image.ops.backends.cpu import backend as cpu_backend
from bonsai_image.ops.backends.triton import backend as triton_backend
from bonsai_image.ops.devices import Gpu
from bonsai_image.ops.packed import unwrap
from bonsai_image.tests.support.reference import random_weight

GEFORCE = Gpu("nvidia", "NVIDIA GeForce RTX 4090", (8, 9))
TURING = Gpu("nvidia", "NVIDIA GeForce RTX 2080", (7, 5))
RADEON = Gpu("amd", "AMD Radeon RX 7900 XTX")
ARC = Gpu("intel", "Intel Arc A770")
CPU, CUDA, XPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu", 0), torch.device("mps")
TERNARY = unwrap(random_weight(2, "symmetric", 192, 256, 128))
AFFINE = unwrap(random_weight(4, "affine", 192, 256, 64))
IMAGE = (512, 1024, 1536, 4096, 4608)

pytestmark = pytest.mark.usefixtures("fresh_backends")
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")


@pytest.fixture
def machine(monkeypatch, fresh_backends):
    """A made-up machine: its GPU, what is missing, no self-check, and the first way is the fastest."""
    def make(gpu: Gpu = GEFORCE, missing: tuple[str, ...] = (), machine: str = "x86_64"):
        for module in (triton_backend, gemlite_backend):
            monkeypatch.setattr(module, "gpu", lambda _device: gpu)
        monkeypatch.setattr("platform.machine", lambda: machine)
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else
                            sys if name in ("triton", "gemlite", "llvmlite") else find(name))
        mlx = libraries.problem
        monkeypatch.setattr(libraries, "problem", lambda library, use=None: mlx(library, use)
                            if library.name == "mlx" else libraries.missing(library))
        monkeypatch.setattr(cpu_backend, "instruction", lambda: "avx2")
        monkeypatch.setattr(selfcheck, "problem", lambda *_: None)
        monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[0])
        fresh_backends()

    return make


def chosen(setting=AUTO, device=CUDA, rows=4608, packed=TERNARY, dtype=torch.bfloat16) -> str:
    """The name of the backend, with a star if it rounds activations."""
    backend, digits, _ = backends.choose(setting, device, rows, packed, dtype)
    return backend.NAME + "*" * bool(digits)


# The choice for a product


def test_an_image_is_expanded_and_multiplied(machine):
    machine()
    for rows in IMAGE:
        assert chosen(rows=rows) == chosen(rows=rows, packed=AFFINE) == chosen(Setting("triton"), rows=rows) == "triton"


def test_few_rows_go_to_gemlite(machine):
    machine()
    assert chosen(rows=64) == "gemlite" and chosen(rows=65) == "triton"
    # Where the out features do not fill GemLite's tiles it would read beyond the scales.
    assert chosen(rows=64, packed=TERNARY.rows(slice(100))) == "triton"
    machine(missing=("gemlite",))
    assert chosen(rows=64) == "triton"


def test_gemlite_by_name_for_any_rows_that_it_can_count(machine):
    machine()
    meta = {"device": "meta", "dtype": torch.uint8}
    wide = TERNARY._replace(codes=torch.empty(27648, 768, **meta), scale=torch.empty(27648, 24, device="meta"))
    deep = TERNARY._replace(codes=torch.empty(3072, 3072, **meta), scale=torch.empty(3072, 96, device="meta"))
    assert chosen(Setting("gemlite")) == "gemlite"
    # 16 and 17 images of 1024 x 1024 at once through the widest layer.
    assert chosen(Setting("gemlite"), rows=16 * 4608, packed=wide) == "gemlite"
    assert chosen(Setting("gemlite"), rows=17 * 4608, packed=wide) == "triton"
    assert chosen(Setting("gemlite"), rows=17 * 4608 * 9 // 4, packed=deep) == "triton"


def test_int8_only_where_asked_for_and_possible(machine):
    machine()
    fast = Setting("auto", "fast")
    assert chosen(fast) == chosen(Setting("triton", "fast")) == "triton*"
    assert chosen(fast, rows=64) == "gemlite"
    assert chosen(fast, packed=AFFINE) == "triton"
    assert chosen(fast, packed=unwrap(random_weight(2, "symmetric", 192, 192, 48))) == "triton"
    # A backend that is chosen by name and has no int8 kernel stays.
    assert chosen(Setting("gemlite", "fast")) == "gemlite" and chosen(Setting("torch", "fast")) == "torch"


@pytest.mark.parametrize(("gpu", "int8", "gemlite"), [
    (GEFORCE, True, None), (GEFORCE._replace(capability=(8, 6)), True, None),
    (GEFORCE._replace(capability=(12, 0)), True, None), (GEFORCE._replace(capability=(9, 0)), True, None),
    (TURING, False, "sm_75"), (RADEON, False, "RX 7900 XTX"), (ARC, False, "A770")])
def test_which_gpus_have_int8_and_gemlite(machine, gpu, int8, gemlite):
    machine(gpu)
    choice = backends.choose(Setting("auto", "fast"), CUDA, 4608, TERNARY, torch.bfloat16)
    assert bool(choice.digits) == int8 and choice.backend is triton_backend
    assert (choice.reason == "") if int8 else choice.reason.startswith("int8 activations") and (
        gpu.name in choice.reason and choice.reason.endswith("; fast means exact here"))
    reason = gemlite_backend.problem(CUDA)
    assert reason is None if gemlite is None else gemlite in reason


def test_other_dtypes_and_groups_stay_with_torch(machine):
    machine()
    assert chosen(dtype=torch.float64) == "torch"
    assert chosen(packed=unwrap(random_weight(1, "symmetric", 64, 24, 12))) == "torch"


# The choice for a device


@pytest.mark.parametrize(("backend", "precision", "device", "missing", "expected", "reason"), [
    ("auto", "exact", CUDA, (), "triton", ""),
    ("auto", "fast", CUDA, (), "triton*", ""),
    ("triton", "fast", CUDA, (), "triton*", ""),
    ("gemlite", "exact", CUDA, (), "gemlite", ""),
    ("torch", "exact", CUDA, (), "torch", ""),
    ("torch", "fast", CUDA, (), "torch", "fast means exact here"),
    ("auto", "exact", XPU, (), "triton", ""),
    ("auto", "exact", CUDA, ("triton",), "torch",
     "triton is not installed (pip install triton, on Windows pip install triton-windows)"),
    ("triton", "exact", CPU, (), "cpu", "the backend triton does not run on cpu"),
    ("auto", "exact", CPU, (), "cpu", ""),
    ("auto", "fast", CPU, (), "cpu*", ""),
    ("auto", "fast", CPU, ("llvmlite",), "torch",
     "llvmlite is not installed (pip install llvmlite); fast means exact here"),
    ("gemlite", "exact", CPU, (), "cpu", "the backend gemlite does not run on cpu"),
    ("mlx", "exact", CUDA, (), "triton", "the backend mlx does not run on cuda"),
    ("mlx", "exact", CPU, (), "cpu",
     "the backend mlx does not multiply 2 bits (symmetric, groups of 128) with 4608 rows of bfloat16"),
])
def test_the_choice_for_a_device_and_its_reason(machine, backend, precision, device, missing, expected, reason):
    machine(missing=missing)
    assert chosen(Setting(backend, precision), device) == expected
    assert backends.choose(Setting(backend, precision), device, 4608, TERNARY, torch.bfloat16).reason == reason


@needs_mlx
@pytest.mark.parametrize(("setting", "device", "machine_type", "expected"), [
    (AUTO, MPS, "arm64", "mlx"), (Setting("auto", "fast"), MPS, "arm64", "mlx"), (Setting("mlx"), MPS, "arm64", "mlx"),
    (Setting("torch"), MPS, "arm64", "torch"), (AUTO, MPS, "x86_64", "torch"), (AUTO, CPU, "arm64", "cpu"),
    (AUTO, CPU, "x86_64", "cpu"), (Setting("mlx"), CPU, "x86_64", "mlx")])
def test_mlx_is_the_choice_on_apple_silicon(machine, setting, device, machine_type, expected):
    machine(machine=machine_type)
    assert chosen(setting, device, dtype=torch.float32) == expected


def test_the_choice_is_logged_once(caplog):
    x, weight = torch.randn(3, 256), random_weight(2, "symmetric", 192, 256, 128)
    with caplog.at_level(logging.INFO):
        for setting in (AUTO, *[Setting("triton", "exact")] * 3):
            linear(x, weight, None, setting)
    choices = [record.getMessage() for record in caplog.records if "multiplies" in record.getMessage()]
    assert choices == ["Bonsai Image: the backend triton does not run on cpu; cpu multiplies packed weights on cpu."]


# What is installed


def test_what_is_installed_is_judged_without_a_device(machine):
    machine(missing=("gemlite", "triton"))
    assert backends.problem("gemlite").startswith("gemlite is not installed")
    assert backends.problem("triton").endswith("on Windows pip install triton-windows)")
    assert backends.problem("torch") is backends.problem("auto") is None
