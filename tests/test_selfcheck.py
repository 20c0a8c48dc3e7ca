"""A backend is used only once it has multiplied right, what happens otherwise, and that anyone can add one."""

import pytest
import torch

from bonsai_image.ops import backends, linear
from bonsai_image.ops.backends import AUTO, Choice, Setting, selfcheck, torch_backend
from bonsai_image.ops.backends.libraries import Library
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.ops.packed import unwrap
from bonsai_image.standalone import doctor
from bonsai_image.standalone.generate import Compute, complete_repository, generate
from bonsai_image.tests.support.reference import dense64, random_weight, relative

CPU = torch.device("cpu")
TERNARY = unwrap(random_weight(2, "symmetric", 192, 256, 128))
AFFINE = unwrap(random_weight(4, "affine", 192, 256, 64))

pytestmark = pytest.mark.usefixtures("fresh_backends")


@pytest.mark.parametrize("form", ["symmetric", "affine", "zeropoint"])
def test_the_self_check_passes_what_is_right(form):
    for bits, group in ((2, 128), (4, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kind = selfcheck.Kind(bits, form, group, dtype, torch.bfloat16)
            assert selfcheck.worst_error(torch_backend, CPU, kind, 0) <= 1


@pytest.mark.parametrize("ambient", [
    lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"), torch.inference_mode, torch.no_grad])
def test_the_self_check_is_the_same_in_any_surroundings(ambient):
    kind = selfcheck.Kind(2, "symmetric", 128, torch.float32, torch.bfloat16)
    expected = [selfcheck.worst_error(torch_backend, CPU, kind, False)]
    with ambient():
        assert [selfcheck.worst_error(torch_backend, CPU, kind, False)] == expected


def test_a_failed_self_check_shows_wherever_a_backend_is_named(monkeypatch, caplog, repository, tmp_path):
    """``tests/host/test_nodes.py`` has Bonsai Model Info."""
    monkeypatch.setattr(selfcheck, "worst_error", lambda backend, *_: 7.0 if backend.NAME == "cpu" else 0.0)
    said = "fails the self-check of the backend cpu on cpu (2 bits, symmetric: 7.0 times the tolerance)"
    choice = backends.choose(AUTO, CPU, 4608, TERNARY, torch.bfloat16)
    assert choice.backend is torch_backend and said in choice.reason
    assert said in caplog.text and "; torch multiplies packed weights on cpu." in caplog.text
    (found,) = [device for device in doctor.diagnose(tmp_path)["devices"] if device["device"] == "cpu"]
    assert found["backends"]["exact"]["ternary"] == "torch" and said in found["not used"]["cpu"]
    result = generate(complete_repository(repository), ["x"], Compute(CPU, torch.bfloat16), 16, 16, 1, progress=False)
    assert result.settings["backend"] == "torch"


class Toy:
    """A backend as somebody else would write it: plain torch, on the CPU, for symmetric weights."""

    NAME, DEVICES = "toy", ("cpu",)
    LIBRARY = Library("toy", "toy", "1.0", "pip install toy", "wind it up")

    def __init__(self, change=lambda out: out, missing: str | None = None):
        self.change, self.missing, self.calls = change, missing, []

    def problem(self, device, digits=0):
        return self.missing

    def serves(self, device, rows, packed, dtype, digits, named):
        return packed.form == "symmetric" and not digits

    def multiply(self, x, packed, digits):
        self.calls.append(x.shape)
        return self.change(torch_backend.multiply(x, packed))


@pytest.fixture
def register(monkeypatch):
    def add(toy: Toy) -> Toy:
        monkeypatch.setattr(backends, "BACKENDS", (toy, *backends.BACKENDS))
        monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: ways[0])
        return toy

    return add


def test_a_backend_from_outside_is_chosen_checked_used_compiled_and_differentiated(register):
    toy = register(Toy())
    for setting in (AUTO, Setting("toy")):
        assert backends.choose(setting, CPU, 3, TERNARY, torch.float32) == Choice(toy, 0)
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
    assert message.startswith("Bonsai Image: toy fails the self-check of the backend toy on cpu (2 bits, symmetric: ")
    assert message.endswith("times the tolerance); to repair it: wind it up; cpu multiplies packed weights on cpu.")


def test_a_backend_that_raises_is_logged_once(register, caplog):
    def broken(_out):
        raise RuntimeError("no C compiler\nand a long story")

    register(Toy(broken))
    for _ in range(3):
        linear(torch.randn(3, 256), random_weight(2, "symmetric", 24, 256, 128))
    assert [record.getMessage() for record in caplog.records] == [
        "Bonsai Image: toy fails the self-check of the backend toy on cpu (RuntimeError: no C compiler); to repair it: "
        "wind it up; cpu multiplies packed weights on cpu."]


class HostInterrupt(BaseException):
    """As ComfyUI's."""


def raising(error: BaseException, rows: int):
    """A change that raises in products of ``rows`` rows: 5 and 80 are those of the self-check."""
    def change(out):
        if len(out) == rows:
            raise error
        return out

    return change


@pytest.mark.parametrize("failure", [
    TypeError("x"), AttributeError("x"), OSError("x"), RuntimeError("device-side assert"), SystemExit(1),
    KeyError("x"), NotImplementedError(), RuntimeError("out of resource: shared memory")], ids=repr)
def test_a_backend_that_fails_in_a_product_is_not_used_again(register, caplog, failure):
    toy = register(Toy(raising(failure, 3)))
    x, weight = torch.randn(3, 256), random_weight(2, "symmetric", 24, 256, 128)
    for _ in range(3):
        assert relative(linear(x, weight), x.double() @ dense64(weight).T) < 1e-6
    assert toy.calls.count((3, 256)) == 1
    (message,) = caplog.messages
    assert "fails in a product of the backend toy on cpu" in message and "multiplies packed weights" in message


@pytest.mark.parametrize("rows", [3, 5, 80])
@pytest.mark.parametrize("failure", [
    KeyboardInterrupt(), HostInterrupt(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("[METAL] Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=repr)
def test_an_interrupt_and_a_lack_of_memory_refuse_nothing(register, caplog, failure, rows):
    """They pass, and the backend is used again."""
    toy = register(Toy(raising(failure, rows)))
    x, weight = torch.randn(3, 256), random_weight(2, "symmetric", 24, 256, 128)
    for _ in range(2):
        with pytest.raises(type(failure)):
            linear(x, weight)
    toy.change = lambda out: out
    linear(x, weight)
    assert toy.calls[-1] == (3, 256) and not caplog.messages


def test_a_missing_backend_is_named_to_who_asks_for_it(register):
    register(Toy(missing="the toy is broken"))
    assert backends.problem("toy") == "the toy is broken"
    choice = backends.choose(Setting("toy"), CPU, 4608, TERNARY, torch.bfloat16)
    assert (choice.backend.NAME, choice.digits, choice.reason) == ("cpu", 0, "the toy is broken")


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
