"""What people do with graphs, on packed weights: each feature of the host against the same on dense weights, in FP32.

Every feature takes a MODEL and gives a latent of the real sampler; packed and dense must agree, and the feature must
have an effect.
"""

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import node_helpers
import pytest
import torch

from bonsai_image.loaders import load_transformer
from bonsai_image.nodes import models
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import HEIGHT, WIDTH, conditioning, random, sample


def batch_of_three(model):
    return sample(model, batch=3)


def image_to_image(model):
    return sample(model, latent=random(1, 128, HEIGHT, WIDTH, seed=8), denoise=0.6)


def inpaint(model):
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : WIDTH // 2] = 1
    return sample(model, latent=random(1, 128, HEIGHT, WIDTH, seed=8), mask=mask)


def one_reference(model):
    return sample(model, conditioning(reference_latents=[random(1, 128, 4, 4, seed=9)]))


def two_references(model):
    return sample(model, conditioning(reference_latents=[random(1, 128, 4, 4, seed=9), random(1, 128, 2, 8, seed=10)]))


def reference_method(model):
    return sample(model, conditioning(reference_latents=[random(1, 128, 4, 4, seed=9)],
                                      reference_latents_method="index_timestep_zero"))


def kv_cache(model):
    from comfy_extras.nodes_flux import FluxKVCache

    return sample(FluxKVCache.execute(model).args[0],
                  conditioning(reference_latents=[random(1, 128, 4, 4, seed=9)]))


def guidance_with_negative_prompt(model):
    return sample(model, cfg=3.5)


def regional_prompts(model):
    left = node_helpers.conditioning_set_values(conditioning(11), {"area": (HEIGHT, WIDTH // 2, 0, 0), "strength": 1.0})
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[..., WIDTH // 2 :] = 1
    right = node_helpers.conditioning_set_values(conditioning(12), {"mask": mask, "mask_strength": 1.0})
    return sample(model, left + right)


def model_sampling(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    return sample(ModelSamplingFlux().patch(model, 2.5, 0.5, 1024, 1024)[0])


def attention_patch(model):
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, **_: {"q": q * 0.5})
    return sample(patched)


def block_replacement(model):
    def skip(args, extra):
        return {"img": args["img"] * 0.9}

    patched = model.clone()
    patched.set_model_patch_replace(skip, "dit", "single_block", 1)
    return sample(patched)


def wrapper(model):
    patched = model.clone()
    patched.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
                        lambda executor, *args, **kwargs: executor(*args, **kwargs) * 0.8)
    return sample(patched)



FEATURES = [batch_of_three, image_to_image, inpaint, one_reference, two_references, reference_method, kv_cache,
            guidance_with_negative_prompt, regional_prompts, model_sampling, attention_patch, block_replacement,
            wrapper]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_feature(pair, feature):
    packed, dense = (feature(model) for model in pair)
    plain = sample(pair[1], batch=len(dense))
    assert relative(dense, plain) > 1e-3 or feature is batch_of_three
    assert relative(packed, dense) < 1e-4
    assert relative(sample(pair[0], batch=len(dense)), plain) < 1e-4, "the feature stays behind on the model"


def test_pictures_of_a_batch_differ(pair):
    first, second, _ = batch_of_three(pair[0])
    assert relative(first, second) > 0.1


def test_variants_in_turn(transformer, binary_transformer):
    """Two MODELs loaded and sampled alternately give what each gives alone, also after everything was unloaded."""
    loaded = [models.load_model(str(path), "fp32") for path in (transformer, binary_transformer)]
    alone = [sample(model) for model in loaded]
    for i in (0, 1, 0, 0, 1):
        assert torch.equal(sample(loaded[i]), alone[i])
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    for model, expected in zip(loaded, alone, strict=True):
        assert torch.equal(sample(model), expected)


def test_a_model_is_freed_with_its_last_reference(transformer):
    import gc
    import weakref

    model = models.load_model(str(transformer), "fp32")
    sample(model)
    alive = weakref.ref(model.model.diffusion_model.single_blocks[0].linear1)
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    assert alive() is None


def test_saved_and_loaded_again(pair, transformer, tmp_path):
    from bonsai_image.loaders import save_transformer

    save_transformer(load_transformer(transformer), tmp_path / "saved.safetensors", "comfy-base3")
    assert torch.equal(sample(models.load_model(str(tmp_path / "saved.safetensors"), "fp32")), sample(pair[0]))


def test_preview_and_progress_reach_the_callback(pair):
    seen = []
    noise = random(1, 128, HEIGHT, WIDTH, seed=3)
    comfy.sample.sample(pair[0], noise, 3, 1.0, "euler", "simple", conditioning(), conditioning(),
                        torch.zeros_like(noise), seed=3,
                        callback=lambda step, denoised, x, total: seen.append((step, total, denoised.shape)))
    assert seen == [(step, 3, noise.shape) for step in range(3)]


def test_cancel_in_mid_step_leaves_the_next_run_whole(pair):
    expected = sample(pair[0])

    def cancel(*_):
        comfy.model_management.interrupt_current_processing()

    noise = random(1, 128, HEIGHT, WIDTH, seed=3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.sample.sample(pair[0], noise, 3, 1.0, "euler", "simple", conditioning(), conditioning(),
                            torch.zeros_like(noise), seed=3, callback=cancel)
    assert torch.equal(sample(pair[0]), expected)
