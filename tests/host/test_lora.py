"""LoRA on packed weights against the same LoRA on the same dense weights, in the same host, in FP32."""

from __future__ import annotations

import functools

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from reference import dense64, relative
from test_parity import host_forward

from bonsai_image.loaders import load_transformer
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.nodes import lora, models
from bonsai_image.nodes.operations import HostLinear
from bonsai_image.ops import torch_backend
from bonsai_image.ops.packed import PackedLayout, is_packed

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1",
          "single_blocks.1.linear2", "img_in")


@pytest.fixture(scope="module")
def tensors(transformer):
    return to_comfyui(load_transformer(transformer).tensors)


@pytest.fixture(scope="module")
def dense_model(tensors):
    """The same weights, dense, in the host's own layers."""
    dense = {name: dense64(t).float() if is_packed(t) else t.float() for name, t in tensors.items()}
    return comfy.sd.load_diffusion_model_state_dict(dense)


@pytest.fixture(scope="module")
def packed_model(transformer):
    return models.load_model(str(transformer), "fp32")


class Maker:
    """Adapter files of every kind, random but of a visible effect."""

    def __init__(self, tensors, seed=0):
        self.shapes = {layer: tuple(tensors[f"{layer}.weight"].shape) for layer in LAYERS}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def file(self, kind: str) -> dict[str, torch.Tensor]:
        result = {}
        for layer, (n, k) in self.shapes.items():
            parts = getattr(self, kind)(n, k)
            result |= {f"diffusion_model.{layer}.{name}": tensor for name, tensor in parts.items()}
        return result

    def lora(self, n, k, rank=4):
        return {"lora_up.weight": self.random(n, rank), "lora_down.weight": self.random(rank, k, scale=0.03),
                "alpha": torch.tensor(2.0)}

    def lora_without_alpha(self, n, k):
        return {"lora_B.weight": self.random(n, 3, scale=0.5), "lora_A.weight": self.random(3, k, scale=0.03)}

    def locon(self, n, k):
        parts = self.lora(n, k)
        return {name: tensor[..., None, None] if tensor.ndim == 2 else tensor for name, tensor in parts.items()}

    def dora(self, n, k):
        return {**self.lora(n, k), "dora_scale": self.random(n, 1).abs() + 0.5}

    def dora_on_the_input_axis(self, n, k):
        return {**self.lora(n, k), "dora_scale": self.random(1, k).abs() + 0.5}

    def loha(self, n, k):
        return {"hada_w1_a": self.random(n, 3), "hada_w1_b": self.random(3, k, scale=0.2),
                "hada_w2_a": self.random(n, 3), "hada_w2_b": self.random(3, k, scale=0.2), "alpha": torch.tensor(1.5)}

    def lokr(self, n, k):
        return {"lokr_w1": self.random(4, 8, scale=0.3), "lokr_w2": self.random(n // 4, k // 8, scale=0.2)}

    def lokr_decomposed(self, n, k):
        return {"lokr_w1": self.random(4, 8, scale=0.3), "lokr_w2_a": self.random(n // 4, 2, scale=0.3),
                "lokr_w2_b": self.random(2, k // 8, scale=0.3), "alpha": torch.tensor(1.0)}

    def lokr_of_two_ranks(self, n, k):
        return {"lokr_w1_a": self.random(4, 3, scale=0.3), "lokr_w1_b": self.random(3, 8),
                "lokr_w2_a": self.random(n // 4, 2, scale=0.3), "lokr_w2_b": self.random(2, k // 8, scale=0.3),
                "alpha": torch.tensor(1.0)}

    def glora(self, n, k):
        return {"a1.weight": self.random(3, k, scale=0.1), "a2.weight": self.random(k, 3, scale=0.1),
                "b1.weight": self.random(3, k, scale=0.1), "b2.weight": self.random(n, 3), "alpha": torch.tensor(3.0)}

    def oft(self, n, k):
        return {"oft_blocks": self.random(8, n // 8, n // 8, scale=0.02), "alpha": torch.tensor(0.5)}

    def boft(self, n, k):
        return {"oft_blocks": self.random(2, 8, n // 8, n // 8, scale=0.02), "alpha": torch.tensor(0.5)}

    def diff(self, n, k):
        return {"diff": self.random(n, k, scale=0.02)}


KINDS = [name for name in vars(Maker) if not name.startswith("_") and name not in ("random", "file")]
#: Kinds that stay in factored form, without a dense copy of the layer.
FACTORED = {"lora", "lora_without_alpha", "locon", "lokr", "lokr_decomposed"}


def with_lora(model, file, strength=1.0):
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(file), strength, 0.0)
    return patched


def codes_of(model):
    return [part.clone() for p in model.model.diffusion_model.parameters() if is_packed(p)
            for part in PackedLayout.get_plain_tensors(p)]


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


def sample(model, seed=3, steps=4):
    noise = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(seed))
    context = torch.randn(1, 512, 3 * 2560, generator=torch.Generator().manual_seed(4))
    conditioning = [[context, {}]]
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", conditioning, conditioning,
                               torch.zeros_like(noise), seed=seed)


def test_final_latent_of_the_sampler(packed_model, dense_model, tensors):
    first, second = Maker(tensors, 1).file("lora"), Maker(tensors, 2).file("lora")
    latents = [sample(with_lora(with_lora(model, first, 0.7), second, 0.5)) for model in (packed_model, dense_model)]
    plain = [sample(model) for model in (packed_model, dense_model)]
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
        noise = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(3))
        context = torch.randn(1, 512, 3 * 2560, generator=torch.Generator().manual_seed(4))
        conditioning = comfy.hooks.set_hooks_for_conditioning([[context, {}]], hooks)
        return comfy.sample.sample(model, noise, 4, 1.0, "euler", "simple", conditioning, conditioning,
                                   torch.zeros_like(noise), seed=3)

    before = codes_of(packed_model)
    expected, actual = run(dense_model), run(packed_model)
    assert relative(expected, sample(dense_model)) > 1e-2
    assert relative(actual, expected) < 1e-4
    assert all(map(torch.equal, before, codes_of(packed_model)))
    assert torch.equal(run(packed_model), actual)
    # The host does not load the model again for a prompt that follows.
    assert relative(sample(packed_model), sample(dense_model)) < 1e-4


def test_lora_on_the_text_encoder_scheduled_through_hooks(pack):
    """One encoding for each strength, as if each had a LoRA of its own; and none is left behind."""
    from comfy_extras.nodes_hooks import SetClipHooks

    clip = models.load_clip(str(pack / "text_encoder-mlx-4bit"), "fp32")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(128, 4, generator=generator), torch.randn(4, 2560, generator=generator) * 0.01
    name = "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.gate_proj"
    file = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    tokens = clip.tokenize("a bonsai")
    expected = [comfy.sd.load_lora_for_models(None, clip, file, 0.0, strength)[1].encode_from_tokens(tokens)
                for strength in (0.7, 0.35)]
    hooks = comfy.hooks.create_hook_lora(dict(file), 0.0, 0.7)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    (scheduled,) = SetClipHooks().apply_hooks(clip, True, False, hooks)
    actual = [cond for cond, _ in scheduled.encode_from_tokens_scheduled(tokens)]
    assert len(actual) == 2 and relative(*expected) > 1e-4
    assert all(relative(*pair) < 1e-5 for pair in zip(actual, expected, strict=True))
    assert torch.equal(clip.encode_from_tokens(tokens), models.load_clip(
        str(pack / "text_encoder-mlx-4bit"), "fp32").encode_from_tokens(tokens))


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
    assert layer.weight_lowvram_function is None and len(layer.side_paths) == 1


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
        assert not any(m.side_paths or m.attached for m in patched.model.modules() if isinstance(m, HostLinear))
    assert relative(host_forward(patched, inputs), host_forward(model, inputs)) > 1e-2


def test_adapters_follow_a_clone_to_its_device(packed_model, tensors):
    """As by the host's nodes that choose a device: a clone of the same model, with the same patches."""
    patched = with_lora(packed_model, Maker(tensors).file("lora"))
    comfy.model_management.load_models_gpu([patched])
    clone = patched.clone()
    clone.load_device = torch.device("meta")
    lora.attach(clone)
    paths = [path for m in clone.model.modules() if isinstance(m, HostLinear) for path in m.side_paths]
    assert paths and {path.down.device.type for path in paths} == {"meta"}
    lora.attach(patched)


def test_adapters_are_let_go_with_the_model(packed_model, tensors, inputs):
    patched = with_lora(packed_model, Maker(tensors).file("lora"))
    host_forward(patched, inputs)
    layers = [m for m in patched.model.modules() if isinstance(m, HostLinear)]
    assert any(layer.side_paths for layer in layers)
    comfy.model_management.unload_all_models()
    assert not any(layer.side_paths for layer in layers)


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_models_are_unloaded_outside_inference_mode(pack, transformer, tensors, inputs, kind):
    """As the server does it between two prompts, which run inside; with another LoRA, and none, afterwards."""
    if kind == "model":
        files = [Maker(tensors, seed).file("lora") for seed in (1, 2)]
        load = functools.partial(models.load_model, str(transformer), "fp32")
        patched, run = with_lora, lambda model: host_forward(model, inputs)
    else:
        name = "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.gate_proj"
        files = [{f"{name}.lora_up.weight": torch.ones(128, 1), f"{name}.lora_down.weight": torch.full((1, 2560), x)}
                 for x in (0.01, 0.02)]
        load = functools.partial(models.load_clip, str(pack / "text_encoder-mlx-4bit"), "fp32")

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


def test_merging_two_bonsai_models_works_densely(transformer, dense_model, tensors, inputs, tmp_path):
    """ModelMergeSimple's way: half of one, half of the other; then the merged model drops the merge again."""
    import random_model

    from bonsai_image.loaders import Transformer, save_transformer

    config = load_transformer(transformer).config
    path = tmp_path / "other.safetensors"
    other = random_model.random_transformer(config, 2, torch.Generator().manual_seed(9))
    save_transformer(Transformer(path, "comfy", other, config), path, "comfy")
    first, second = models.load_model(str(transformer), "fp32"), models.load_model(str(path), "fp32")
    dense_second = comfy.sd.load_diffusion_model_state_dict(
        {name: dense64(t).float() if is_packed(t) else t.float() for name, t in to_comfyui(other).items()})

    def merge(one, two):
        merged = one.clone()
        for key, value in two.get_key_patches("diffusion_model.").items():
            merged.add_patches({key: value}, 0.5, 0.5)
        return merged

    expected = host_forward(merge(dense_model, dense_second), inputs)
    assert relative(host_forward(merge(first, second), inputs), expected) < 1e-4
    assert relative(expected, host_forward(dense_model, inputs)) > 1e-2
    assert relative(host_forward(first, inputs), host_forward(dense_model, inputs)) < 1e-5


def test_save_node_refuses_a_patched_model(packed_model, tensors):
    from bonsai_image import nodes

    with pytest.raises(ValueError, match="LoRA"):
        nodes.BonsaiSaveModel.execute(with_lora(packed_model, Maker(tensors).file("lora")), "x", "packed")


def test_lora_on_the_text_encoder(pack):
    """The stock loader on CLIP: the packed encoder with a LoRA against one with the same LoRA merged by hand."""
    path = str(pack / "text_encoder-mlx-4bit")
    clip = models.load_clip(path, "fp32")
    layer = "model.layers.3.mlp.gate_proj"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(128, 4, generator=generator), torch.randn(4, 2560, generator=generator) * 0.01
    name = "text_encoders.qwen3_4b.transformer." + layer
    file = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    _, patched = comfy.sd.load_lora_for_models(None, clip, file, 0.0, 0.7)
    assert len(patched.patcher.patches) == 1
    tokens = clip.tokenize("a bonsai")
    plain, actual = clip.encode_from_tokens(tokens), patched.encode_from_tokens(tokens)
    module = clip.cond_stage_model.qwen3_4b.transformer.get_submodule(layer)
    packed = module.weight
    comfy.model_management.unload_all_models()
    module.weight = torch.nn.Parameter(dense64(packed).float() + 0.7 * up @ down, requires_grad=False)
    expected = clip.encode_from_tokens(tokens)
    assert relative(expected, plain) > 1e-4
    assert relative(actual, expected) < 1e-5 < relative(actual, plain)


def test_side_paths_count_one_kernel_call_per_layer(packed_model, tensors, inputs, monkeypatch):
    calls = []
    original = torch_backend.packed_linear
    monkeypatch.setattr(torch_backend, "packed_linear", lambda *args: calls.append(1) or original(*args))
    host_forward(with_lora(packed_model, Maker(tensors).file("lora")), inputs)
    assert len(calls) == sum(is_packed(p) for p in packed_model.model.diffusion_model.parameters())
