"""Which backend multiplies a product, what happens where one is missing or broken, and that anyone can add one."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import dense64, random_weight, relative

from bonsai_image.ops import backends, gemlite_backend, linear, selfcheck, torch_backend, triton_backend, tuning
from bonsai_image.ops.backends import AUTO, Choice, Setting
from bonsai_image.ops.cpu import backend as cpu_backend
from bonsai_image.ops.devices import Gpu
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.ops.mlx import backend as mlx_backend
from bonsai_image.ops.packed import parts

GEFORCE = Gpu("nvidia", "NVIDIA GeForce RTX 4090", (8, 9))
TURING = Gpu("nvidia", "NVIDIA GeForce RTX 2080", (7, 5))
RADEON = Gpu("amd", "AMD Radeon RX 7900 XTX")
ARC = Gpu("intel", "Intel Arc A770")
CPU, CUDA, XPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu", 0), torch.device("mps")
TERNARY = parts(random_weight(2, "symmetric", 192, 256, 128))
AFFINE = parts(random_weight(4, "affine", 192, 256, 64))
IMAGE = (512, 1024, 1536, 4096, 4608)

needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget all verdicts before and after; every library is installed and every backend passes its self-check."""
    caches = (backends._problem, backends._log_choice, selfcheck._passes, mlx_backend.problem)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A made-up machine: its GPU, what is missing, and no self-check."""
    def make(gpu: Gpu = GEFORCE, missing: tuple[str, ...] = (), machine: str = "x86_64"):
        for module in (triton_backend, gemlite_backend, tuning):
            monkeypatch.setattr(module, "gpu", lambda _device: gpu)
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr(gemlite_backend, "version", lambda name: None if name in missing else
                            {"gemlite": "0.6.0", "triton": "3.7.1"}[name])
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else
                            sys if name in ("triton", "gemlite", "llvmlite") else find(name))
        monkeypatch.setattr(cpu_backend, "instruction", lambda: "avx2")
        monkeypatch.setattr(selfcheck, "passes", lambda *_: True)
        monkeypatch.setattr(backends, "default_dtype", lambda _device: torch.bfloat16)

    return make


def chosen(setting=AUTO, device=CUDA, rows=4608, packed=TERNARY, dtype=torch.bfloat16) -> str:
    """The name of the backend, with a star if it rounds activations."""
    backend, fast = backends.choose(setting, device, rows, packed, dtype)
    return backend.NAME + "*" * fast


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
    backends._problem.cache_clear()
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
    assert chosen(fast, packed=parts(random_weight(2, "symmetric", 192, 192, 48))) == "triton"
    # A backend that is chosen by name and has no int8 kernel stays.
    assert chosen(Setting("gemlite", "fast")) == "gemlite" and chosen(Setting("torch", "fast")) == "torch"


@pytest.mark.parametrize(("gpu", "possible"), [
    (GEFORCE, True), (GEFORCE._replace(capability=(8, 6)), True), (GEFORCE._replace(capability=(12, 0)), True),
    (TURING, False), (RADEON, False), (ARC, False), (GEFORCE._replace(capability=(8, 0)), False),
    (GEFORCE._replace(capability=(9, 0)), False), (GEFORCE._replace(capability=(10, 3)), False)])
def test_which_gpus_have_int8(machine, gpu, possible):
    machine(gpu)
    assert chosen(Setting("auto", "fast")) == ("triton*" if possible else "triton")
    choice = backends.resolve(Setting("auto", "fast"), CUDA)
    assert choice.fast == possible and choice.backend == "triton"
    assert (choice.reason == "") if possible else choice.reason.startswith("int8 activations") and (
        gpu.name in choice.reason and choice.reason.endswith("; fast means exact here"))


def test_other_dtypes_and_groups_stay_with_torch(machine):
    machine()
    assert chosen(dtype=torch.float64) == "torch"
    assert chosen(packed=parts(random_weight(1, "symmetric", 64, 24, 12))) == "torch"


# The choice for a device


@pytest.mark.parametrize(("backend", "precision", "device", "missing", "expected"), [
    ("auto", "exact", CUDA, (), Choice("triton", False)),
    ("auto", "fast", CUDA, (), Choice("triton", True)),
    ("triton", "fast", CUDA, (), Choice("triton", True)),
    ("gemlite", "exact", CUDA, (), Choice("gemlite", False)),
    ("torch", "exact", CUDA, (), Choice("torch", False)),
    ("torch", "fast", CUDA, (), Choice("torch", False, "fast means exact here")),
    ("auto", "exact", XPU, (), Choice("triton", False)),
    ("auto", "exact", CUDA, ("triton",), Choice("torch", False, triton_backend.NOT_INSTALLED)),
    ("triton", "exact", CPU, (), Choice("cpu", False, "the backend triton does not run on cpu")),
    ("auto", "exact", CPU, (), Choice("cpu", False)),
    ("auto", "fast", CPU, (), Choice("cpu", True)),
    ("auto", "fast", CPU, ("llvmlite",), Choice("torch", False, f"{cpu_backend.NOT_INSTALLED}; fast means exact here")),
    ("gemlite", "exact", CPU, (), Choice("cpu", False, "the backend gemlite does not run on cpu")),
    ("mlx", "exact", CUDA, (), Choice("triton", False, "the backend mlx does not run on cuda")),
])
def test_the_choice_for_a_device_and_its_reason(machine, backend, precision, device, missing, expected):
    machine(missing=missing)
    assert backends.resolve(Setting(backend, precision), device) == expected


@needs_mlx
@pytest.mark.parametrize(("setting", "device", "machine_type", "expected"), [
    (AUTO, MPS, "arm64", "mlx"), (Setting("auto", "fast"), MPS, "arm64", "mlx"), (Setting("mlx"), MPS, "arm64", "mlx"),
    (Setting("torch"), MPS, "arm64", "torch"), (AUTO, MPS, "x86_64", "torch"), (AUTO, CPU, "arm64", "cpu"),
    (AUTO, CPU, "x86_64", "cpu"), (Setting("mlx"), CPU, "x86_64", "mlx")])
def test_mlx_is_the_choice_on_apple_silicon(machine, setting, device, machine_type, expected):
    machine(machine=machine_type)
    assert backends.resolve(setting, device, torch.float32).backend == expected
    assert chosen(setting, device, dtype=torch.float32) == expected


@pytest.mark.parametrize(("device", "machine_type", "expected"), [
    (MPS, "arm64", True), (MPS, "x86_64", False), (CPU, "arm64", False)])
def test_mlx_is_for_apple_silicon(machine, device, machine_type, expected):
    machine(machine=machine_type)
    assert mlx_backend.serves(device, 4608, TERNARY, torch.bfloat16, False, False) == expected


def test_the_choice_is_logged_once(caplog):
    x, weight = torch.randn(3, 256), random_weight(2, "symmetric", 192, 256, 128)
    with caplog.at_level(logging.INFO):
        for setting in (AUTO, *[Setting("triton", "fast")] * 3):
            assert torch.equal(linear(x, weight, None, setting), linear(x, weight))
    choices = [record.getMessage() for record in caplog.records if "multiplies" in record.getMessage()]
    assert choices == ["Bonsai Image: the backend triton does not run on cpu; cpu multiplies packed weights on cpu."]


# What is installed


@pytest.mark.parametrize(("gemlite", "triton", "said"), [
    ("0.6.0.post2", "3.9.0", None),
    ("0.6.0", "3.6.0", None),
    ("0.5.1.post1", "3.7.1", None),
    (None, "3.9.0", "gemlite is not installed (pip install gemlite,"),
    ("0.6.0", None, "on Windows pip install triton-windows"),
    ("0.5.1.post1", "3.8.0", "gemlite 0.5.1.post1 does not work with triton 3.8.0; update it"),
    ("0.5.1", "3.10.0", "gemlite 0.5.1 does not work with triton 3.10.0"),
    ("0.6.0", "3.5.1", "gemlite 0.6.0 needs triton 3.6 or newer, found 3.5.1; update PyTorch"),
])
def test_versions_of_gemlite_and_triton(gemlite, triton, said):
    reason = gemlite_backend.version_problem(gemlite, triton)
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(("gpu", "said"), [(GEFORCE, None), (TURING, "sm_75"), (RADEON, "RX 7900 XTX"), (ARC, "A770")])
def test_gemlite_and_gpus(machine, gpu, said):
    machine(gpu)
    reason = gemlite_backend.problem(CUDA)
    assert reason is None if said is None else said in reason


def test_what_is_installed_is_judged_without_a_device(machine):
    machine(missing=("gemlite", "triton"))
    assert backends.problem("gemlite").startswith("gemlite is not installed")
    assert backends.problem("triton") == triton_backend.NOT_INSTALLED
    assert backends.problem("torch") is backends.problem("auto") is None


# The self-check


@pytest.mark.parametrize("form", ["symmetric", "affine", "zeropoint"])
def test_the_self_check_passes_what_is_right(form):
    for bits, group in ((2, 128), (4, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kind = selfcheck.Kind(bits, form, group, dtype, torch.bfloat16)
            assert selfcheck.worst_error(torch_backend, CPU, kind, False) <= 1


class Toy:
    """A backend as somebody else would write it: plain torch, on the CPU, for symmetric weights."""

    NAME, DEVICES, REMEDY = "toy", ("cpu",), "wind it up"

    def __init__(self, change=lambda out: out, missing: str | None = None):
        self.change, self.missing, self.calls = change, missing, []

    def problem(self, device, fast=False):
        return self.missing

    def serves(self, device, rows, packed, dtype, fast, named):
        return packed.form == "symmetric" and not fast

    def multiply(self, x, packed, fast):
        self.calls.append(x.shape)
        return self.change(torch_backend.multiply(x, packed))


@pytest.fixture
def register(monkeypatch):
    def add(toy: Toy) -> Toy:
        monkeypatch.setattr(backends, "BACKENDS", (toy, *backends.BACKENDS))
        return toy

    return add


def test_a_backend_from_outside_is_chosen_checked_used_compiled_and_differentiated(register):
    toy = register(Toy())
    assert backends.resolve(AUTO, CPU).backend == backends.resolve(Setting("toy"), CPU).backend == "toy"
    layer = PackedLinear(256, 24, bias=False)
    layer.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    reference = dense64(layer.weight)
    x = torch.randn(3, 256, requires_grad=True)
    out = layer(x)
    assert toy.calls == [(5, 1024), (80, 1024), (3, 256)], "two products to check it, then the layer's"
    out.sum().backward()
    assert relative(out.detach(), x.detach().double() @ reference.T) < 1e-6
    assert relative(x.grad, reference.sum(0).expand(3, -1)) < 1e-6
    x.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    assert torch.equal(compiled, out) and relative(x.grad, reference.sum(0).expand(3, -1)) < 1e-6
    assert toy.calls[3:] == [(3, 256)]
    linear(x, random_weight(4, "affine", 24, 256, 64))
    assert len(toy.calls) == 4, "what it does not serve goes to the next"


@pytest.mark.parametrize("change", [lambda out: out.roll(1, 1), lambda out: out * float("nan"),
                                    lambda out: out * 1.01], ids=["rolled", "nan", "1 % off"])
def test_a_wrong_backend_is_found_and_logged_once(register, caplog, change):
    toy = register(Toy(change))
    x, weight = torch.randn(3, 256), random_weight(2, "symmetric", 24, 256, 128)
    for _ in range(3):
        assert relative(linear(x, weight), x.double() @ dense64(weight).T) < 1e-6
    assert len(toy.calls) == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Bonsai Image: the backend toy fails its self-check on cpu (2 bits, symmetric: ")
    assert message.endswith("times the tolerance) and is not used. To repair it: wind it up.")


def test_a_backend_that_raises_is_logged_once(register, caplog):
    def broken(_out):
        raise RuntimeError("no C compiler\nand a long story")

    register(Toy(broken))
    for _ in range(3):
        linear(torch.randn(3, 256), random_weight(2, "symmetric", 24, 256, 128))
    assert [record.getMessage() for record in caplog.records] == [
        "Bonsai Image: the backend toy fails its self-check on cpu (no C compiler) and is not used. To repair it: "
        "wind it up."]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")])
def test_running_out_of_memory_refuses_nothing(register, error):
    full = [error]

    def change(out):
        if full:
            raise full.pop()
        return out

    toy, weight = register(Toy(change)), random_weight(2, "symmetric", 24, 256, 128)
    with pytest.raises(type(error)):
        linear(torch.randn(3, 256), weight)
    linear(torch.randn(3, 256), weight)
    assert toy.calls[-1] == (3, 256)


def test_asking_for_one_backend_does_not_check_the_others(register):
    toy = register(Toy())
    assert not backends.multiplies("torch", AUTO, CPU, TERNARY, torch.float32) and not toy.calls
    assert backends.multiplies("toy", AUTO, CPU, TERNARY, torch.float32) and len(toy.calls) == 2
    assert not backends.multiplies("toy", AUTO, CPU, AFFINE, torch.float32)


def test_a_missing_backend_is_named_to_who_asks_for_it(register):
    register(Toy(missing="the toy is broken"))
    assert backends.problem("toy") == "the toy is broken"
    assert backends.resolve(Setting("toy"), CPU) == Choice("cpu", False, "the toy is broken")
    assert chosen(Setting("toy"), CPU) == "cpu"


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("precision", backends.PRECISIONS)
def test_every_setting_multiplies_on_a_cpu(name, precision):
    weight, x = random_weight(2, "symmetric", 64, 256, 128), torch.randn(3, 256)
    assert relative(linear(x, weight, None, Setting(name, precision)), x.double() @ dense64(weight).T) < 0.02


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_compiles_to_one_graph_and_has_a_gradient(name):
    layer, x = PackedLinear(256, 64, bias=False), torch.randn(3, 256, requires_grad=True)
    layer.load_state_dict({"weight": random_weight(2, "symmetric", 64, 256, 128)})
    layer.setting = Setting(name)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    out.sum().backward()
    assert torch.equal(out, layer(x))
    assert relative(x.grad, dense64(layer.weight).sum(0).expand(3, -1)) < 1e-6


def test_no_rows():
    weight = random_weight(2, "symmetric", 64, 256, 128)
    assert linear(torch.empty(2, 0, 256), weight, None, Setting("mlx")).shape == (2, 0, 64)


# MLX


_IMPORTS = """
import sys, torch
import bonsai_image.standalone.cli, bonsai_image.loaders
from bonsai_image.ops import Setting, linear, packed_weight
weight = packed_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), 2)
linear(torch.ones(1, 128), weight)
assert not [name for name in sys.modules if name.split(".")[0] == "mlx"], "imported unasked"
linear(torch.ones(1, 128), weight, None, Setting("mlx"))
assert "mlx.core" in sys.modules, "not imported when asked for"
"""


@needs_mlx
def test_mlx_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_BROKEN_IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import einops, torch
from bonsai_image.ops import Setting, linear, packed_weight
weight = packed_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), 2)
assert linear(torch.ones(1, 128), weight, None, Setting("mlx")).shape == (1, 8)
assert not [name for name in sys.modules if name.split(".")[0] == "mlx"]
assert einops.rearrange(torch.ones(2, 3), "a b -> b a").shape == (3, 2)
"""


def test_an_mlx_that_cannot_be_imported_leaves_nothing_behind(tmp_path):
    """einops imports the core of whatever is in sys.modules by the name of a framework."""
    pytest.importorskip("einops")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('Failed to load the default metallib')\n")
    done = subprocess.run([sys.executable, "-c", _BROKEN_IMPORT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("failure", ["wrong", "kernel", "bits", "missing"])
def test_a_broken_mlx_is_logged_once_and_the_next_multiplies(failure, monkeypatch, caplog):
    mx = pytest.importorskip("mlx.core")
    product = mx.quantized_matmul

    def broken(x, *args, **kwargs):
        if failure == "kernel":
            raise RuntimeError("[metal::Device] Unable to load kernel affine_qmm_t\nand more")
        if failure == "bits" and kwargs["bits"] == 1:
            raise ValueError("[quantized_matmul] the requested number of bits 1 is not supported")
        # As the miscompiled matrix kernels did: right for a few rows, wrong for many.
        return product(x, *args, **kwargs) * (2 if failure == "wrong" and x.shape[0] > 8 else 1)

    if failure == "missing":
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx" else find(name))
    monkeypatch.setattr(mx, "quantized_matmul", broken)
    weight, x = random_weight(1, "symmetric", 64, 512, 128), torch.randn(20, 512)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(linear(x, weight, None, Setting("mlx")), linear(x, weight))
    (message,) = [text for text in caplog.messages if "mlx" in text.lower()]
    assert "\n" not in message
    if failure == "missing":
        assert "pip install mlx" in message
    elif failure == "bits":
        assert "is too old" in message and "pip install --upgrade mlx" in message
    else:
        assert "--force-reinstall" in message and "macOS to 26.2" in message


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac it would measure")
def test_the_mac_script_refuses_other_machines():
    script = Path(__file__).parent.parent / "benchmarks" / "mac.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Nothing was run" in done.stdout and not done.stderr
