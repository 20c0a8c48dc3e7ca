"""Adapters on the packed embedding of a text encoder, and merged text encoders."""

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import CLIPAdd, CLIPMergeSimple, CLIPSubtract

from bonsai_image.loaders import load_text_encoder
from bonsai_image.loaders.qwen3 import Qwen3Config
from bonsai_image.nodes import models
from bonsai_image.ops.packed import PackedLayout, is_packed
from bonsai_image.tests.support import random_model
from bonsai_image.tests.support.adapters import KINDS, Maker
from bonsai_image.tests.support.reference import dense64, relative

#: As small as ComfyUI's Klein encoder can be, with 1,024 words, so that a dense table takes no memory to speak of.
SMALL = Qwen3Config(vocab_size=1024, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1,
                    intermediate_size=128)
TABLE = "qwen3_4b.transformer.model.embed_tokens.weight"
TOKENS = {"qwen3_4b": [[(int(token), 1.0) for token in torch.arange(24) * 41 % 1000]]}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two small packed text encoders, and what they are in ComfyUI's own dense layers, in FP32."""
    folder, packed, dense = tmp_path_factory.mktemp("encoders"), [], []
    for seed in (0, 1):
        path = random_model.write_repository(folder / str(seed), seed=seed, text=SMALL) / "text_encoder-mlx-4bit"
        packed.append(models.load_clip(str(path), "fp32"))
        tensors = load_text_encoder(path).tensors
        dense.append(comfy.sd.load_text_encoder_state_dicts(
            [{name: (dense64(t) if is_packed(t) else t).float() for name, t in tensors.items()}],
            clip_type=comfy.sd.CLIPType.FLUX2, model_options={
                "dtype": torch.float32, "qwen3_4b_model_config": models.text_dimensions(SMALL)}))
    return packed, dense


def encode(clip):
    return clip.encode_from_tokens(TOKENS)


def with_table_lora(clip, file):
    file = {f"text_encoders.{TABLE.removesuffix('.weight')}.{name}": tensor for name, tensor in file.items()}
    patched = comfy.sd.load_lora_for_models(None, clip, file, 0.0, 0.7)[1]
    assert list(patched.patcher.patches) == [TABLE]
    return patched


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), ["lora", "lora_without_alpha"], ["lora", "lokr"]],
                         ids="+".join)
def test_every_kind_on_the_embedding(encoders, kinds):
    (packed, _), (dense, _) = encoders
    plain, maker = encode(dense), Maker()
    for kind in kinds:
        file = getattr(maker, kind)(1024, 2560)
        packed, dense = with_table_lora(packed, file), with_table_lora(dense, file)
    expected = encode(dense)
    assert relative(expected, plain) > 1e-2
    assert relative(encode(packed), expected) < 1e-4
    assert relative(encode(encoders[0][0]), plain) < 1e-5


def test_a_plain_lora_converts_only_the_rows_looked_up(encoders, monkeypatch):
    patched = with_table_lora(encoders[0][0], Maker().lora(1024, 2560))
    expected = encode(patched)
    monkeypatch.setattr(PackedLayout, "dequantize", None)
    assert torch.equal(encode(patched), expected)


@pytest.mark.parametrize("merge", [
    lambda one, other: CLIPMergeSimple().merge(one, other, 0.3),
    lambda one, other: CLIPSubtract().merge(one, other, 0.4),
    lambda one, other: CLIPAdd().merge(one, other),
], ids=["CLIPMergeSimple", "CLIPSubtract", "CLIPAdd"])
def test_merged_text_encoders(encoders, merge):
    packed, dense = (encode(merge(*pair)[0]) for pair in encoders)
    assert relative(dense, encode(encoders[1][0])) > 1e-2
    assert relative(packed, dense) < 1e-4
    assert relative(encode(encoders[0][0]), encode(encoders[1][0])) < 1e-5
