"""When adapters come and go: with loads, clones, prompts, hooks and failures, as ComfyUI moves the model."""

import dataclasses
import functools

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.weight_adapter
import pytest
import torch

from bonsai_image.nodes import lora, models
from bonsai_image.nodes.operations import HostLinear
from bonsai_image.tests.support.adapters import KINDS, LAYERS, Maker, codes_of, with_lora
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import conditioning, host_forward, sample


def test_final_latent_of_the_sampler(packed_model, dense_model, tensors):
    first, second = Maker(tensors, 1).file("lora"), Maker(tensors, 2).file("lora")
    latents = [sample(with_lora(with_lora(model, first, 0.7), second, 0.5), steps=4)
               for model in (packed_model, dense_model)]
    plain = [sample(model, steps=4) for model in (packed_model, dense_model)]
    assert relative(latents[1], plain[1]) > 1e-2
    assert relative(latents[0], latents[1]) < 1e-4
    assert relative(plain[0], plain[1]) < 1e-4


def test_scheduled_lora_through_hooks(packed_model, dense_model, tensors):
    """A LoRA that the host switches on half way."""
    file = Maker(tensors, 5).file("lora")

    def run(model):
        hooks = comfy.hooks.create_hook_lora(dict(file), 0.9, 0.0)
        key_map = comfy.lora.model_lora_keys_unet(model.model, {})
        assert key_map
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        hooked = comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks)
        return sample(model, hooked, hooked, steps=4)

    before = codes_of(packed_model)
    expected, actual = run(dense_model), run(packed_model)
    assert relative(expected, sample(dense_model, steps=4)) > 1e-2
    assert relative(actual, expected) < 1e-4
    assert all(map(torch.equal, before, codes_of(packed_model)))
    assert torch.equal(run(packed_model), actual)
    # The host does not load the model again for a prompt that follows.
    assert relative(sample(packed_model, steps=4), sample(dense_model, steps=4)) < 1e-4


def test_the_same_prompt_again_keeps_the_lora(packed_model, dense_model, tensors, inputs):
    """The host forgets and finds a loaded model between prompts, without loading it again."""
    file = Maker(tensors).file("lora")
    expected, patched = host_forward(with_lora(dense_model, file), inputs), with_lora(packed_model, file)
    for _ in range(3):
        assert relative(host_forward(patched, inputs), expected) < 1e-4


def test_offloaded_layers_do_not_apply_a_lora_twice(packed_model, dense_model, tensors, inputs):
    """The low-VRAM way of the host leaves the patch among the layer's weight functions as well."""
    from comfy.model_patcher import LowVramPatch

    file = Maker(tensors).file("lora")
    expected = host_forward(with_lora(dense_model, file), inputs)
    patched = with_lora(packed_model, file)
    comfy.model_management.load_models_gpu([patched])
    for name, module in patched.model.named_modules():
        if isinstance(module, HostLinear) and f"{name}.weight" in patched.patches:
            module.weight_function = [LowVramPatch(f"{name}.weight", patched.patches)]
    actual = host_forward(patched, inputs)
    for module in patched.model.modules():
        if isinstance(module, HostLinear):
            module.weight_function = []
    assert relative(actual, expected) < 1e-4


def test_dynamic_vram_leaves_the_patch_to_us(packed_model, tensors):
    """What the host's dynamic patcher attaches for merging is taken away again when the load is done."""
    from comfy.model_patcher import LowVramPatch

    patched = with_lora(packed_model, Maker(tensors).file("lora"))
    layer = patched.model.diffusion_model.single_blocks[0].linear1
    layer.weight_lowvram_function = LowVramPatch("diffusion_model.single_blocks.0.linear1.weight", patched.patches)
    lora.attach(patched, loading=True)
    assert layer.weight_lowvram_function is None and len(layer.adapters.paths) == 1


def test_no_memory_for_the_adapters_leaves_nothing_loaded(transformer, tensors, inputs, monkeypatch):
    """The host takes back what it began to load; and nothing is attached to a model that failed to load."""
    model = models.load_model(str(transformer), "fp32")
    patched = with_lora(model, Maker(tensors).file("lora"))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name in ((lora, "side_paths"), (patched, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(torch.OutOfMemoryError):
                comfy.model_management.load_models_gpu([patched])
        comfy.model_management.unload_all_models()
        assert patched.loaded_size() == 0
        assert not any(m.adapters for m in patched.model.modules() if isinstance(m, HostLinear))
    assert relative(host_forward(patched, inputs), host_forward(model, inputs)) > 1e-2


def test_adapters_follow_a_clone_to_its_device(packed_model, tensors):
    """As by the host's nodes that choose a device: a clone of the same model, with the same patches."""
    patched = with_lora(packed_model, Maker(tensors).file("lora"))
    comfy.model_management.load_models_gpu([patched])
    clone = patched.clone()
    clone.load_device = torch.device("meta")
    lora.attach(clone)
    paths = [path for m in clone.model.modules() if isinstance(m, HostLinear) for path in m.adapters.paths]
    assert paths and {factor.device.type for path in paths for factor in path.adapter.one} == {"meta"}
    lora.attach(patched)


def test_adapters_are_let_go_with_the_model(packed_model, tensors, inputs):
    patched = with_lora(packed_model, Maker(tensors).file("lora"))
    host_forward(patched, inputs)
    layers = [m for m in patched.model.modules() if isinstance(m, HostLinear)]
    assert any(layer.adapters.paths for layer in layers)
    comfy.model_management.unload_all_models()
    assert not any(layer.adapters for layer in layers)


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_models_are_unloaded_outside_inference_mode(repository, transformer, tensors, inputs, kind):
    """As the server does it between two prompts, which run inside; with another LoRA, and none, afterwards."""
    if kind == "model":
        files = [Maker(tensors, seed).file("lora") for seed in (1, 2)]
        load = functools.partial(models.load_model, str(transformer), "fp32")
        patched, run = with_lora, lambda model: host_forward(model, inputs)
    else:
        name = "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.gate_proj"
        files = [{f"{name}.lora_up.weight": torch.ones(128, 1), f"{name}.lora_down.weight": torch.full((1, 2560), x)}
                 for x in (0.01, 0.02)]
        load = functools.partial(models.load_clip, str(repository / "text_encoder-mlx-4bit"), "fp32")

        def patched(clip, file):
            return comfy.sd.load_lora_for_models(None, clip, file, 0.0, 1.0)[1]

        def run(clip):
            return clip.encode_from_tokens(clip.tokenize("a bonsai"))

    with torch.inference_mode():
        fresh = load()
        expected = [run(fresh), *(run(patched(fresh, file)) for file in files)]
        model = load()
    for turns in ((0, 1, 2), (1, 2, 0), (2, 0)):
        with torch.inference_mode():
            for turn in turns:
                assert torch.equal(run(patched(model, files[turn - 1]) if turn else model), expected[turn])
        comfy.model_management.unload_all_models()


def test_a_clone_with_a_lora_does_not_change_the_model_that_is_loaded(packed_model, tensors, inputs):
    """A LoRA Loader while the model is sampled: its clone shares the layers, and has not been loaded."""
    expected = host_forward(packed_model, inputs)
    with_lora(packed_model, Maker(tensors).file("lora"))
    with torch.inference_mode():
        assert torch.equal(packed_model.model.diffusion_model(*inputs), expected)
    assert not any(m.adapters.paths for m in packed_model.model.modules() if isinstance(m, HostLinear))


def tensors_in(thing) -> list[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, functools.partial):
        thing = thing.args
    elif dataclasses.is_dataclass(thing):
        thing = tuple(vars(thing).values())
    elif isinstance(thing, comfy.weight_adapter.WeightAdapterBase):
        thing = thing.weights
    return [tensor for part in thing for tensor in tensors_in(part)] if isinstance(thing, tuple) else []


def bytes_of(file) -> int:
    return sum(tensor.nbytes for name, tensor in file.items() if not name.endswith("alpha"))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"diff"}))
def test_factors_are_copied_to_the_device_by_the_load(packed_model, tensors, kind):
    """And not from pageable memory in every layer and step; whole matrices stay in RAM."""
    patched = with_lora(packed_model, Maker(tensors).file(kind))
    patched.load_device = torch.device("meta")
    lora.attach(patched, loading=True)
    paths = [path for layer in LAYERS
             for path in patched.model.diffusion_model.get_submodule(layer).adapters.paths]
    lora.detach(patched, True)
    assert len(paths) == len(LAYERS) and {tensor.device.type for tensor in tensors_in(tuple(paths))} == {"meta"}


@pytest.fixture
def sizes(monkeypatch):
    """The size of the first model of every load, as ComfyUI asks for it to make room."""
    seen, load = [], comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu",
                        lambda models, **options: seen.append(models[0].model_size()) or load(models, **options))
    return seen


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_factors_are_counted_before_the_model_is_loaded(packed_model, tensors, kind, sizes):
    file = Maker(tensors).file(kind)
    for model in (packed_model, with_lora(packed_model, file, 0.2), packed_model):
        sample(model, steps=1)
    assert sizes == [sizes[0], sizes[0] + bytes_of(file), sizes[0]]


def test_factors_of_hooks_are_counted(packed_model, tensors, sizes):
    file = Maker(tensors).file("lora")
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning(), comfy.hooks.create_hook_lora(file, 0.2, 0.0))
    for positive in (None, hooked, None):
        sample(packed_model, positive, steps=1)
    assert sizes == [sizes[0], sizes[0] + bytes_of(file), sizes[0]]


def test_factors_of_a_text_encoder_are_counted(repository):
    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "fp32")
    name = "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.gate_proj"
    file = {f"{name}.lora_up.weight": torch.ones(128, 1), f"{name}.lora_down.weight": torch.ones(1, 2560)}
    patched = comfy.sd.load_lora_for_models(None, clip, file, 0.0, 1.0)[1]
    patched.encode_from_tokens(patched.tokenize("a bonsai"))
    assert patched.patcher.model_size() - clip.patcher.model_size() == bytes_of(file)
