"""A text encoder that ComfyUI reads itself, in FP8 as Comfy-Org publishes it, beside our MODEL."""

import json

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

import nodes as host_nodes
from bonsai_image.loaders import ModelFileError
from bonsai_image.loaders.qwen3 import Qwen3Config, qwen3_shapes
from bonsai_image.nodes import models
from bonsai_image.tests.support.sampling import sample

#: ComfyUI tells the encoder by its width.
TEXT = Qwen3Config(vocab_size=1024, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1,
                   intermediate_size=128)


@pytest.fixture
def fp8(tmp_path, monkeypatch):
    """Tagged FP8 linears with a scale each, all else in BF16."""
    tag = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, shape in qwen3_shapes(TEXT).items():
        layer = name.removesuffix(".weight")
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = torch.randn(shape, generator=generator)
        if "embed" in name:
            tensors[name] = weight.bfloat16()
        else:
            tensors |= {name: weight.to(torch.float8_e4m3fn), f"{layer}.weight_scale": torch.tensor(shape[1] ** -0.5),
                        f"{layer}.comfy_quant": tag.clone()}
    save_file(tensors, tmp_path / "qwen_3_4b_fp8.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "qwen_3_4b_fp8.safetensors"


def test_load_clip_with_our_model(fp8, packed_model, monkeypatch):
    """Our loader names ComfyUI's own, whose CLIP our MODEL takes."""
    with pytest.raises(ModelFileError, match=r"float8_e4m3fn.*ComfyUI's own Load CLIP, type flux2"):
        models.load_clip(str(fp8))
    # ComfyUI fixes the sizes to Qwen3-4B's; this encoder is smaller.
    small = {"qwen3_4b_model_config": models.text_dimensions(TEXT)}
    load = comfy.sd.load_clip
    monkeypatch.setattr(comfy.sd, "load_clip", lambda model_options, **options: load(
        model_options=model_options | small, **options))
    clip, = host_nodes.CLIPLoader().load_clip(fp8.name, "flux2")
    drawn = []
    for prompt in ("a bonsai", "a lake"):
        tokens = {name: [[(token % TEXT.vocab_size, weight) for token, weight in batch] for batch in batches]
                  for name, batches in clip.tokenize(prompt).items()}
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        assert conditioning[0][0].shape[-1] == 3 * TEXT.hidden_size
        drawn.append(sample(packed_model, positive=conditioning))
    assert torch.isfinite(drawn[0]).all() and not torch.equal(*drawn)
