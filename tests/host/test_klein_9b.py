"""Klein 9B's widths, of which nobody has published packed weights: 4096 in both models, and 12288 between them."""

import dataclasses

import comfy.model_detection
import comfy.ops
import comfy.sd
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import Transformer, save_transformer
from bonsai_image.loaders.formats import comfy as packed_format
from bonsai_image.loaders.klein import KleinConfig, comfyui_shapes
from bonsai_image.nodes import models
from bonsai_image.ops.packed import is_packed
from bonsai_image.tests.host.conftest import KLEIN, TEXT
from bonsai_image.tests.support import random_model
from bonsai_image.tests.support.reference import dense64, relative
from bonsai_image.tests.support.sampling import sample

WIDE = dataclasses.replace(TEXT, hidden_size=4096, vocab_size=64)


def test_text_encoder_conditions_the_model(tmp_path):
    """As ComfyUI encodes with the same weights dense; our MODEL of that width draws with it."""
    tensors = random_model.random_text_encoder(WIDE, torch.Generator().manual_seed(4))
    save_file({f"text_encoders.qwen3_8b.transformer.{name}": tensor
               for name, tensor in packed_format.encode(tensors).items()}, tmp_path / "qwen3_8b.safetensors")
    clip = models.load_clip(str(tmp_path / "qwen3_8b.safetensors"), "fp32")
    assert not hasattr(clip.cond_stage_model.qwen3_8b.transformer.model, "lm_head")
    dense = {name: dense64(t).float() if is_packed(t) else t.float() for name, t in tensors.items()}
    theirs = comfy.sd.load_text_encoder_state_dicts([dense], clip_type=comfy.sd.CLIPType.FLUX2, model_options={
        "qwen3_8b_model_config": models.text_dimensions(WIDE) | {"final_norm": True}})
    tokens = {name: [[(token % WIDE.vocab_size, weight) for token, weight in batch[:40]] for batch in batches]
              for name, batches in clip.tokenize("a bonsai").items()}
    assert list(tokens) == ["qwen3_8b"]
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    assert conditioning[0][0].shape == (1, 40, 3 * 4096)
    # ComfyUI stores dense weights in FP16.
    assert relative(conditioning[0][0], theirs.encode_from_tokens(tokens)) < 1e-3
    config = dataclasses.replace(KLEIN, joint_attention_dim=3 * 4096)
    path = tmp_path / "model.safetensors"
    drawn = random_model.random_transformer(config, 2, torch.Generator().manual_seed(5))
    save_transformer(Transformer(path, "comfy", drawn, config), path, "comfy")
    assert bool(torch.isfinite(sample(models.load_model(str(path), "fp32"), positive=conditioning)).all())


def test_shapes_of_the_model():
    """ComfyUI recognises tensors of 9B's shapes, and builds exactly those."""
    shapes = comfyui_shapes(KleinConfig(32, 3 * 4096, num_layers=8, num_single_layers=24))
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(meta, "")
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    built = config.get_model({}, "", device="meta").diffusion_model
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == shapes
