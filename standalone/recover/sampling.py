"""The sampler of the pipeline as what distillation needs: its noise levels, and all latents of a trajectory."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

#: Pixels along a side of a latent token: the VAE's 8, two by two.
SIDE = 16


def _grid(*lengths: int) -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, lengths)).float()


class Sampler:
    """Euler steps at one size. Latents are tokens ``(B, height / 16 * width / 16, channels)`` in FP32."""

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, width: int, height: int, steps: int,
                 device: torch.device):
        self.rows, self.columns = height // SIDE, width // SIDE
        self.tokens = self.rows * self.columns
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device,
                                mu=compute_empirical_mu(self.tokens, steps))
        #: ``(steps + 1,)``, from 1 down to 0.
        self.sigmas = scheduler.sigmas.to(device)

    def noise(self, seeds: list[int], channels: int) -> torch.Tensor:
        """What ``generate`` starts from with these seeds in FP32."""
        drawn = [torch.randn(channels, self.tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).mT.to(self.sigmas.device)

    def velocity(self, transformer: torch.nn.Module, x: torch.Tensor, levels: torch.Tensor,
                 text: torch.Tensor) -> torch.Tensor:
        """The prediction for ``x`` at ``levels`` (B,), indices of :attr:`sigmas`, in FP32; computed in the dtype of
        ``text`` (B, T, D)."""
        ids = _grid(1, self.rows, self.columns, 1), _grid(1, 1, 1, text.shape[1])
        image_ids, text_ids = (each.to(x.device) for each in ids)
        return transformer(hidden_states=x.to(text.dtype), encoder_hidden_states=text, guidance=None,
                           timestep=self.sigmas[levels].to(text.dtype), img_ids=image_ids, txt_ids=text_ids,
                           return_dict=False)[0].float()

    def trajectory(self, transformer: torch.nn.Module, x: torch.Tensor, text: torch.Tensor) -> Iterator[torch.Tensor]:
        """``x`` and the latents after each step."""
        yield x
        for level, step in enumerate(self.sigmas.diff()):
            x = x + step * self.velocity(transformer, x, torch.full((len(x),), level, device=x.device), text)
            yield x

    def pictured(self, x: torch.Tensor, vae: torch.nn.Module) -> torch.Tensor:
        """Tokens -> latents as the VAE decodes them."""
        spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        latents = x.to(vae.dtype) * spread + vae.bn.running_mean
        return torch.nn.functional.pixel_shuffle(latents.mT.unflatten(2, (self.rows, self.columns)), 2)
