"""The same model files in ComfyUI and in diffusers or transformers: the same numbers."""

import pytest
import torch

from bonsai_image.loaders import find_repository, load_text_encoder, load_transformer, save_transformer
from bonsai_image.nodes import models
from bonsai_image.ops import Setting
from bonsai_image.standalone import generate as generating
from bonsai_image.standalone.models import text_encoder_module, transformer_module, vae_module
from bonsai_image.tests.support import random_model
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward

CPU = torch.device("cpu")
FP32 = generating.Compute(CPU, torch.float32, Setting("torch"))


@pytest.fixture(scope="module")
def clip(repository):
    return models.load_clip(str(repository / "text_encoder-mlx-4bit"), compute_dtype="fp32")


def diffusers_forward(module, inputs):
    latent, sigma, context = inputs
    batch, channels, height, width = latent.shape
    one = torch.arange(1)
    with torch.inference_mode():
        out = module(
            hidden_states=latent.flatten(2).transpose(1, 2), encoder_hidden_states=context, timestep=sigma,
            img_ids=torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(context.shape[1])), guidance=None,
            return_dict=False)[0]
    return out.transpose(1, 2).view(batch, channels, height, width)


@pytest.mark.parametrize("target", ["mlx", "gemlite", "comfy", "comfy-base3", "diffusers"])
def test_model_equals_diffusers_in_every_format(transformer, inputs, tmp_path, target):
    source = load_transformer(transformer)
    path = transformer
    if target != "mlx":
        path = tmp_path / ("model.safetensors" if target.startswith("comfy") else "model")
        save_transformer(source, path, target)
    expected = diffusers_forward(transformer_module(source, CPU, torch.float32), inputs)
    assert relative(host_forward(models.load_model(str(path), "fp32"), inputs), expected) < 1e-5


def test_binary_model_equals_diffusers(binary_transformer, inputs):
    expected = diffusers_forward(transformer_module(load_transformer(binary_transformer), CPU, torch.float32), inputs)
    assert relative(host_forward(models.load_model(str(binary_transformer), "fp32"), inputs), expected) < 1e-5


def test_text_encoder_equals_transformers(repository, clip):
    """Through the host's own tokenizer and template; the host in FP32."""
    path = repository / "text_encoder-mlx-4bit"
    tokens = clip.tokenize("a bonsai in a blue pot")
    ours = clip.encode_from_tokens(tokens)
    module = text_encoder_module(load_text_encoder(path), CPU, torch.float32)
    ids = torch.tensor([[token for token, _weight in tokens["qwen3_4b"][0]]])
    pad = 151643
    with torch.inference_mode():
        states = module(input_ids=ids, attention_mask=(ids != pad).long(), output_hidden_states=True,
                        use_cache=False).hidden_states
    expected = torch.stack([states[layer] for layer in (9, 18, 27)], dim=1).permute(0, 2, 1, 3).flatten(2)
    real = int((ids != pad).sum())
    assert ours.shape == (1, 512, 3 * 2560) and real > 10
    assert relative(ours[:, :real], expected[:, :real]) < 1e-4


def test_vae_equals_diffusers(repository):
    vae = models.load_vae_model(str(repository / "vae"))
    module = vae_module(repository / "vae", CPU, torch.float32)
    image = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(image)
    assert latent.shape == (1, 128, 2, 3)
    with torch.inference_mode():
        mean = module.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        patches = mean.view(1, 32, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 128, 2, 3)
        std = (module.bn.running_var + module.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        expected = (patches - module.bn.running_mean.view(1, -1, 1, 1)) / std
        assert relative(latent.detach(), expected) < 1e-4
        decoded = module.decode(mean).sample
    assert relative(vae.decode(latent).detach(), (decoded / 2 + 0.5).clamp(0, 1).movedim(1, -1)) < 1e-4


@pytest.fixture(scope="module")
def pipeline(comfyui, repository):
    """The text encoder in diffusers, with the whole vocabulary, which the repository leaves out."""
    found = find_repository(repository)
    found.tokenizer = comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    pipeline = generating.text_pipeline(found, FP32)
    pipeline.tokenizer.chat_template = random_model._CHAT_TEMPLATE
    return pipeline


@pytest.mark.parametrize("prompt", [
    "", "a " * 503, "a red bonsai, " * 150, "a bonsai " * 750,
    "a \\(round\\) pot (red:1.3), {blue|green} // __any__ \\{ [x] ((y))\u2028 in\r\n\teinem Topf 盆栽\n"],
    ids=["empty", "512", "600", "1500", "literal"])
def test_a_prompt_has_the_same_embedding_in_diffusers(prompt, pipeline, clip):
    """In every token, also of those that fill it up, which the diffusion model sees as well."""
    with torch.inference_mode():
        ours = generating.encode(pipeline, [prompt], FP32)
    theirs = clip.encode_from_tokens(clip.tokenize(prompt))
    assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-4
