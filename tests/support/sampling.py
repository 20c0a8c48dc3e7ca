"""A small latent through ComfyUI's sampler, with fixed noise and conditioning, or once through the model."""

import comfy.model_management
import comfy.sample
import torch

HEIGHT, WIDTH = 4, 6
TEXT_WIDTH = 3 * 2560


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioning(seed=4, **values):
    return [[random(1, 512, TEXT_WIDTH, seed=seed), values]]


def sample(model, positive=None, negative=None, cfg=1.0, batch=1, latent=None, mask=None, denoise=1.0, steps=3):
    noise = random(batch, 128, HEIGHT, WIDTH, seed=3)
    latent = torch.zeros_like(noise) if latent is None else latent
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", positive or conditioning(),
                               negative or conditioning(5), latent, denoise=denoise, noise_mask=mask, seed=3)


def host_forward(patcher, inputs):
    """One call of the diffusion model of a loaded ``patcher``."""
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model.diffusion_model(*inputs)
