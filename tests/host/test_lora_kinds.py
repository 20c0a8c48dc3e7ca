"""Every kind of adapter on packed weights against the same on dense weights, in the same ComfyUI, in FP32."""

import comfy.model_management
import comfy.weight_adapter
import pytest
import torch

from bonsai_image.nodes.side_paths import side_paths
from bonsai_image.ops import backends
from bonsai_image.ops.packed import PackedLayout, is_packed
from bonsai_image.ops.side_paths import Difference, Patch
from bonsai_image.tests.support.adapters import FACTORED, KINDS, Maker, codes_of, with_lora
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_dense_model(packed_model, dense_model, tensors, inputs, kind, monkeypatch):
    file = Maker(tensors).file(kind)
    before = codes_of(packed_model)
    plain = host_forward(dense_model, inputs)
    expected = host_forward(with_lora(dense_model, file), inputs)
    patched = with_lora(packed_model, file)
    comfy.model_management.load_models_gpu([patched])
    if kind in FACTORED:
        monkeypatch.setattr(PackedLayout, "dequantize", None)
    actual = host_forward(patched, inputs)
    monkeypatch.undo()
    assert relative(expected, plain) > 1e-2
    assert relative(actual, expected) < 1e-4
    assert all(map(torch.equal, before, codes_of(packed_model)))
    assert torch.equal(host_forward(packed_model, inputs), host_forward(packed_model.clone(), inputs))
    assert relative(host_forward(packed_model, inputs), plain) < 1e-5


def test_the_comparison_can_fail(packed_model, dense_model, tensors, inputs):
    one, other = Maker(tensors, 1).file("lora"), Maker(tensors, 2).file("lora")
    assert relative(host_forward(with_lora(packed_model, one), inputs),
                    host_forward(with_lora(dense_model, other), inputs)) > 1e-2


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "lokr"), ("lora", "dora"), ("diff", "lora_without_alpha"),
                                   ("lora", "locon", "lora", "lora_without_alpha")], ids="+".join)
def test_stacked_with_different_strengths(packed_model, dense_model, tensors, inputs, kinds):
    pair = [packed_model, dense_model]
    for i, kind in enumerate(kinds):
        file = Maker(tensors, i).file(kind)
        pair = [with_lora(model, file, (0.8, -0.4, 1.3, 0.2)[i]) for model in pair]
    assert relative(host_forward(pair[0], inputs), host_forward(pair[1], inputs)) < 1e-4


def test_strength_changed_between_runs(packed_model, dense_model, tensors, inputs):
    file = Maker(tensors).file("lora")
    for strength in (1.0, 0.3, 0.0, 1.0):
        assert relative(host_forward(with_lora(packed_model, file, strength), inputs),
                        host_forward(with_lora(dense_model, file, strength), inputs)) < 1e-4


@pytest.mark.parametrize("style", ["diffusers", "kohya", "lycoris"])
def test_split_names_reach_their_rows(packed_model, dense_model, tensors, inputs, style):
    """q, k and v of their own, in the names other trainers use; the host maps them onto rows of the fused layer."""
    maker, hidden = Maker(tensors), tensors["img_in.weight"].shape[0]
    file = {}
    for part in ("attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.linear_in"):
        n = 6 * hidden if part == "ff.linear_in" else hidden
        layer = f"transformer_blocks.0.{part}"
        up, down = maker.random(n, 4), maker.random(4, hidden, scale=0.05)
        if style != "diffusers":
            name = {"kohya": "lora_transformer_", "lycoris": "lycoris_"}[style] + layer.replace(".", "_")
            file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}
        else:
            name = f"transformer.{layer}"
            file |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    expected = host_forward(with_lora(dense_model, file), inputs)
    assert relative(expected, host_forward(dense_model, inputs)) > 1e-2
    assert relative(host_forward(with_lora(packed_model, file), inputs), expected) < 1e-4


def test_side_paths_count_one_kernel_call_per_layer(packed_model, tensors, inputs, monkeypatch):
    calls = []
    original = backends.multiply
    monkeypatch.setattr(backends, "multiply", lambda *args: calls.append(1) or original(*args))
    host_forward(with_lora(packed_model, Maker(tensors).file("lora")), inputs)
    assert len(calls) == sum(is_packed(p) for p in packed_model.model.diffusion_model.parameters())


def lokr_patch(more=(), **fields):
    adapter = comfy.weight_adapter.LoKrAdapter(
        set(), (torch.ones(4, 8), torch.ones(2, 4), None, None, None, None, None, None, None, *more))
    vars(adapter).update(fields)
    return 1.0, adapter, 1.0, None, None


@pytest.mark.parametrize(("patch", "kind"), [
    (lokr_patch(key="layer.weight", row_offset=None), Patch), (lokr_patch(more=(None,)), Difference)],
    ids=["fields of newer versions of ComfyUI", "a longer tuple, which only ComfyUI understands"])
def test_what_is_translated(patch, kind):
    (path,) = side_paths([patch], "layer.weight", torch.device("cpu"))
    assert isinstance(path, kind)
