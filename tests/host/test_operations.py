"""The packed layers under ComfyUI's weight management: what is cast is given back, and no move decodes a weight."""

import copy
import pickle
from collections import Counter

import comfy.ops
import pytest
import torch

from bonsai_image.nodes import models, operations
from bonsai_image.nodes.operations import HostEmbedding, HostLayer, HostLinear
from bonsai_image.ops.packed import PackedLayout, is_packed
from bonsai_image.tests.support.sampling import sample


@pytest.fixture
def casts(monkeypatch):
    """The layers cast and not yet given back, in a host that has something to give back for each."""
    held = []

    def cast(layer, **kwargs):
        held.append(layer)
        return torch.zeros(layer.weight.shape), None, ("stream", None, None)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda layer, *_: held.remove(layer))
    return held


@pytest.mark.parametrize(("kind", "x"), [(HostLinear, torch.zeros(1, 8)), (HostEmbedding, torch.zeros(1, 8).long())])
def test_a_layer_that_fails_gives_its_weight_back(kind, x, casts, monkeypatch):
    """Under dynamic VRAM, its pages would otherwise stay pinned as long as the model lives."""
    def full(*_):
        assert casts == [layer]
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer = kind(8, 8)
    layer.weight = torch.nn.Parameter(torch.zeros(8, 8, device="meta"), requires_grad=False)
    with monkeypatch.context() as patch:
        patch.setattr(operations, kind.__name__.removeprefix("Host").lower(), full)
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
    assert casts == []
    layer(x)
    assert casts == []


def test_a_text_encoder_moved_to_the_cpu_is_not_decoded(repository, monkeypatch):
    """Its layers keep the pages they had on the GPU, and ComfyUI then decodes, and rounds, the weight of each."""
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "fp32")
    tokens = clip.tokenize("a bonsai")
    expected = clip.encode_from_tokens(tokens)
    for module in clip.cond_stage_model.modules():
        if is_packed(getattr(module, "weight", None)):
            module._v = "pages on a GPU"
    monkeypatch.setattr(PackedLayout, "dequantize", None)
    assert torch.equal(clip.encode_from_tokens(tokens), expected)


def test_a_layer_without_a_weight_says_so():
    for layer, x in ((HostLinear(8, 8), torch.zeros(1, 8)), (HostEmbedding(8, 8), torch.zeros(1, 8).long())):
        with pytest.raises(RuntimeError, match="no weight yet"):
            layer(x)


@pytest.fixture
def runs(monkeypatch):
    """Layer -> how often its forward ran."""
    counts = Counter()
    for kind in (HostLinear, HostEmbedding):
        def forward(layer, *args, _original=kind.forward, **kwargs):
            counts[layer] += 1
            return _original(layer, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return counts


def test_every_layer_runs_once_a_step(packed_model, runs):
    """If ComfyUI fetched a weight and multiplied it itself, as it may for some fused layers, adapters would be lost."""
    sample(packed_model, steps=2)
    layers = [module for module in packed_model.model.modules() if isinstance(module, HostLayer)]
    assert runs == dict.fromkeys(layers, 2) and len(layers) > 20


def test_every_layer_of_the_text_encoder_runs_once(repository, runs):
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "fp32")
    clip.encode_from_tokens(clip.tokenize("a bonsai"))
    layers = [module for module in clip.cond_stage_model.modules() if isinstance(module, HostLayer)]
    assert runs == dict.fromkeys(layers, 1) and len(layers) == 27 * 7 + 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@pytest.mark.parametrize("inside", [False, True])
def test_a_copy_of_the_diffusion_model_draws_the_same(transformer, duplicate, inside):
    """Other node packs make them."""
    model = models.load_model(str(transformer), "fp32")
    expected, original = sample(model), model.model.diffusion_model
    with torch.inference_mode(inside):
        model.model.diffusion_model = duplicate(original)
    assert model.model.diffusion_model is not original
    assert torch.equal(sample(model), expected)
