"""Adapters on the packed text encoder."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch

from bonsai_image.nodes import models
from bonsai_image.tests.support.reference import dense64, relative


def test_lora_on_the_text_encoder(repository):
    """The stock loader on CLIP: the packed encoder with a LoRA against one with the same LoRA merged by hand."""
    path = str(repository / "text_encoder-mlx-4bit")
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


def test_lora_on_the_text_encoder_scheduled_through_hooks(repository):
    """One encoding for each strength, as if each had a LoRA of its own; and none is left behind."""
    from comfy_extras.nodes_hooks import SetClipHooks

    clip = models.load_clip(str(repository / "text_encoder-mlx-4bit"), "fp32")
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
        str(repository / "text_encoder-mlx-4bit"), "fp32").encode_from_tokens(tokens))
