"""The text encoder and VAE of FLUX.2 Klein by ComfyUI's own loaders, beside our MODEL."""

import json
from contextlib import nullcontext

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from bonsai_image.loaders import ModelFileError
from bonsai_image.loaders.qwen3 import Qwen3Config, qwen3_shapes
from bonsai_image.nodes import models
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import sample

#: ComfyUI tells the encoder by its width.
TEXT = Qwen3Config(vocab_size=1024, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1,
                   intermediate_size=128)


#: A scale that BF16 holds exactly together with every FP8 number.
SCALE = 2.0**-5


@pytest.fixture(params=["bf16", "fp8"])
def encoder_format(request) -> str:
    return request.param


@pytest.fixture
def klein(encoder_format, tmp_path, monkeypatch, repository):
    """Names of a text encoder and a VAE as a user of FLUX.2 Klein has them, and the first in BF16."""
    tag = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    generator, own, plain = torch.Generator().manual_seed(2), {}, {}
    for name, shape in qwen3_shapes(TEXT).items():
        weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        plain[name] = torch.ones(shape).bfloat16() if len(shape) == 1 else weight.bfloat16() * SCALE
        layer = name.removesuffix(".weight")
        own |= {name: plain[name]} if encoder_format == "bf16" or len(shape) == 1 or "embed" in name else {
            name: weight, f"{layer}.weight_scale": torch.tensor(SCALE), f"{layer}.comfy_quant": tag.clone()}
    for kind, files in (("text_encoders", {"qwen_3_4b.safetensors": own, "plain.safetensors": plain}),
                        ("vae", {"flux2-vae.safetensors": load_file(next(repository.glob("vae/*.safetensors")))})):
        (tmp_path / kind).mkdir()
        for file, tensors in files.items():
            save_file(tensors, tmp_path / kind / file)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    # ComfyUI fixes the sizes to Qwen3-4B's; this encoder is smaller.
    small, load = {"qwen3_4b_model_config": models.text_dimensions(TEXT)}, comfy.sd.load_clip
    monkeypatch.setattr(comfy.sd, "load_clip", lambda model_options, **options: load(
        model_options=model_options | small, **options))
    return tmp_path


def test_klein_files_draw_what_ours_draw(klein, encoder_format, packed_model):
    """The template for those who have FLUX.2 Klein: ComfyUI's own loaders of text encoder and VAE."""
    refused = pytest.raises(ModelFileError, match=r"float8_e4m3fn.*ComfyUI's own Load CLIP, type flux2")
    with refused if encoder_format == "fp8" else nullcontext():
        models.load_clip(str(klein / "text_encoders" / "qwen_3_4b.safetensors"))
    ours = (models.load_clip(str(klein / "text_encoders" / "plain.safetensors")),
            models.load_vae_model(str(klein / "vae")))
    (clip,), (vae,) = (host_nodes.CLIPLoader().load_clip("qwen_3_4b.safetensors", "flux2"),
                       host_nodes.VAELoader().load_vae("flux2-vae.safetensors"))
    drawn = {}
    for prompt in ("a bonsai", "a lake"):
        for whose, (encoder, decoder) in {"ours": ours, "klein": (clip, vae)}.items():
            tokens = {name: [[(token % TEXT.vocab_size, weight) for token, weight in batch] for batch in batches]
                      for name, batches in encoder.tokenize(prompt).items()}
            conditioning = encoder.encode_from_tokens_scheduled(tokens)
            assert conditioning[0][0].shape[-1] == 3 * TEXT.hidden_size
            drawn[prompt, whose] = decoder.decode(sample(packed_model, positive=conditioning))
    for prompt in ("a bonsai", "a lake"):
        assert relative(drawn[prompt, "ours"], drawn[prompt, "klein"]) < 1e-3
    assert relative(drawn["a bonsai", "klein"], drawn["a lake", "klein"]) > 1e-2
