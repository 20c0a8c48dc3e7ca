"""The packed layers against the float64 reference on the same codes."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bonsai_image.ops import Setting, backends
from bonsai_image.ops.backends import torch_backend
from bonsai_image.ops.linear import PackedEmbedding, PackedLinear, linear
from bonsai_image.ops.packed import PackedLayout, packed_nbytes, unwrap
from bonsai_image.tests.support.reference import dense64, random_weight, relative

CASES = [(1, "symmetric", 128), (2, "symmetric", 128), (2, "symmetric", 32), (1, "symmetric", 64), (4, "symmetric", 64),
         (1, "affine", 128), (2, "affine", 128), (4, "affine", 64), (4, "zeropoint", 64)]
#: Unit roundoff times a small constant: one rounding of the inputs, one of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("case", "dtype"), list(itertools.product(CASES, TOLERANCE)), ids=str)
def test_agrees_with_the_reference(case, dtype, backend):
    bits, form, group = case
    weight = random_weight(bits, form, 40, 256, group)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    result = linear(x, weight, None, Setting(backend))
    assert result.dtype == dtype
    assert relative(result, x.double() @ dense64(weight).T) < TOLERANCE[dtype]


def test_several_blocks_agree_with_one(monkeypatch):
    weight = random_weight(2, "symmetric", 100, 256, 128)
    x = torch.randn(5, 256)
    whole = linear(x, weight, None, Setting("torch"))
    sizes, original = [], torch_backend.dequantize
    monkeypatch.setattr(torch_backend, "dequantize", lambda part, dtype: sizes.append(part.n) or original(part, dtype))
    monkeypatch.setattr(torch_backend, "CPU_BLOCK_ELEMENTS", 7 * 256)
    assert relative(linear(x, weight, None, Setting("torch")), whole) < 1e-6
    assert sizes == [7] * 14 + [2]


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (2, 0, 256), (0, 256), (1, 2, 3, 256)], ids=str)
def test_any_number_of_dimensions_and_no_rows(shape):
    weight = random_weight(2, "symmetric", 24, 256, 128)
    x = torch.randn(shape)
    result = linear(x, weight, torch.ones(24))
    assert result.shape == (*shape[:-1], 24)
    assert torch.allclose(result.double(), x.double() @ dense64(weight).T + 1, atol=1e-4)


def test_non_contiguous_input_and_bias():
    weight = random_weight(1, "symmetric", 24, 256, 128)
    x = torch.randn(256, 6).t()
    bias = torch.randn(24)
    assert not x.is_contiguous()
    assert relative(linear(x, weight, bias), x.double() @ dense64(weight).T + bias) < 1e-6


def test_gradient_reaches_the_activations():
    weight = random_weight(2, "symmetric", 24, 256, 128)
    x = torch.randn(3, 256, requires_grad=True)
    linear(x, weight).sum().backward()
    assert relative(x.grad, dense64(weight).sum(0).expand(3, -1)) < 1e-6


def test_compiles_to_one_call():
    weight = random_weight(2, "symmetric", 24, 256, 128)
    module = PackedLinear(256, 24, bias=False)
    module.load_state_dict({"weight": weight})
    graphs = []

    def backend(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.randn(3, 256)
    with torch.no_grad():
        compiled = torch.compile(module, backend=backend, fullgraph=True)(x)
    assert torch.equal(compiled, module(x))
    assert len(graphs) == 1 and sum("packed_linear" in str(target) for target in graphs[0]) == 1


def test_module_holds_nothing_until_loaded_and_then_no_copy():
    with torch.device("meta"):
        module = PackedLinear(256, 24, bias=False)
    assert module.weight is None and not list(module.parameters())
    weight = random_weight(2, "symmetric", 24, 256, 128)
    module.load_state_dict({"weight": weight})
    pairs = list(zip(unwrap(module.weight)[:2], unwrap(weight)[:2], strict=True))
    assert all(held.data_ptr() == given.data_ptr() for held, given in pairs)


def test_module_refuses_a_wrong_shape_and_a_missing_weight():
    module = PackedLinear(256, 25, bias=False)
    with pytest.raises(RuntimeError, match="expected shape"):
        module.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def test_state_dict_is_plain_tensors_that_count_every_byte():
    module = PackedLinear(256, 24, bias=False)
    weight = random_weight(4, "affine", 24, 256, 64)
    module.load_state_dict({"weight": weight})
    state = module.state_dict()
    assert state.keys() == {"weight", "weight_scale", "weight_shift", "comfy_quant"}
    assert sum(t.nbytes for name, t in state.items() if name != "comfy_quant") == packed_nbytes(weight)


def test_moving_a_module_keeps_the_scales():
    module = PackedLinear(256, 24, bias=False)
    module.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    before = [part.clone() for part in PackedLayout.get_plain_tensors(module.weight)]
    module.to(dtype=torch.float16).to("cpu")
    assert module.weight.dtype == torch.float16
    assert all(map(torch.equal, before, PackedLayout.get_plain_tensors(module.weight)))


def test_dense_weights_work_too():
    module = PackedLinear(256, 24, bias=True)
    weight, bias = torch.randn(24, 256), torch.randn(24)
    module.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(3, 256)
    assert torch.equal(module(x), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(("bits", "form", "group"), CASES)
def test_embedding_dequantizes_the_rows_asked_for(bits, form, group):
    table = random_weight(bits, form, 50, 256, group)
    module = PackedEmbedding(50, 256)
    module.load_state_dict({"weight": table.to(dtype=torch.float64)})
    indices = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(module(indices), dense64(table)[indices])


def test_names_that_nobody_asked_for_are_reported():
    weight, bias = random_weight(2, "symmetric", 24, 256, 128), torch.zeros(24)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        PackedLinear(256, 24, bias=False).load_state_dict({"weight": weight, "extra": bias})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        PackedLinear(256, 24, bias=False).load_state_dict({"weight": weight, "bias": bias})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        PackedLinear(256, 24).load_state_dict({"weight": weight})
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(24,\), found \(25,\)"):
        PackedLinear(256, 24).load_state_dict({"weight": weight, "bias": torch.zeros(25)})


@pytest.mark.parametrize("module", [PackedLinear(256, 24), PackedEmbedding(24, 256)])
def test_a_layer_without_a_weight_says_so(module):
    with pytest.raises(RuntimeError, match=f"this {type(module).__name__} has no weight yet; load a state dict first"):
        module(torch.zeros(3, 256).long())


def test_repr():
    module = PackedLinear(256, 24, bias=False)
    assert repr(module) == "PackedLinear(24, 256, bias=False, not loaded)"
    module.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    assert repr(module) == "PackedLinear(24, 256, bias=False, 2 bits, symmetric, groups of 128)"
    module.load_state_dict({"weight": torch.zeros(24, 256)})
    assert repr(module) == "PackedLinear(24, 256, bias=False, float32)"


def test_a_layer_that_ran_in_inference_mode_is_moved_outside_and_runs_again():
    """As hosts do, in any order: load, run and unload, in and out of inference mode."""
    module, x = PackedLinear(256, 24, bias=False), torch.randn(2, 256)
    module.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    expected = module(x)
    with torch.inference_mode():
        module.to("cpu")
        assert torch.equal(module(x), expected)
        module.to(torch.float16)
    module.to("cpu").to(torch.float32)
    assert torch.equal(module(x), expected)
    # What comfy-kitchen does to a parameter outside of inference mode when a host unloads it.
    assert torch.equal(module.weight.detach().dequantize(), module.weight.dequantize())
    with torch.inference_mode():
        assert module.weight.is_inference() and torch.equal(module.weight.detach().dequantize(),
                                                            module.weight.dequantize())


def test_calling_the_module_runs_the_kernel(monkeypatch):
    """Not the silent fallback of QuantizedTensor, which would dequantize the whole weight."""
    calls = []
    original = torch_backend.multiply
    monkeypatch.setattr(backends, "BACKENDS", (torch_backend,))
    monkeypatch.setattr(torch_backend, "multiply", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(PackedLayout, "dequantize", None)
    module = PackedLinear(256, 24, bias=False)
    module.load_state_dict({"weight": random_weight(2, "symmetric", 24, 256, 128)})
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            module(torch.randn(2, 256))
    assert len(calls) == 3


TWO_COPIES = """
import importlib.util, sys, torch
def load(name):
    spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return [importlib.import_module(f"{name}.ops.{module}") for module in ("packed", "linear")]
one = load("one")
weight = one[0].packed_weight(torch.full((8, 32), 228, dtype=torch.uint8), torch.rand(8, 1), 2)
x = torch.randn(3, 128)
expected = one[1].linear(x, weight, None, one[1].Setting("torch"))
for packed, linear in (one, load("two"), one):
    assert packed.is_packed(weight) and packed.is_packed(weight[2:]), packed
    assert torch.equal(linear.linear(x, weight, None, linear.Setting("torch")), expected)
"""


def test_a_second_copy_of_the_pack_in_the_process_changes_nothing():
    subprocess.run([sys.executable, "-c", TWO_COPIES, Path(__file__).parents[1]], check=True, timeout=300)
