"""The trained miniature in ComfyUI; its text encoder and VAE, which have sizes of their own, in diffusers."""

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_flux import Flux2Scheduler
from diffusers import Flux2KleinPipeline

from bonsai_image.loaders import find_repository, load_text_encoder
from bonsai_image.miniature import demo
from bonsai_image.ops import Setting
from bonsai_image.standalone import models

CPU = torch.device("cpu")
SIDE, STEPS = 128, 4
REPOSITORY = find_repository(demo.MINIATURE / "ternary")


class Ends:
    """diffusers' text encoder and VAE of the miniature."""

    def __init__(self):
        self.vae = models.vae_module(REPOSITORY.vae, CPU, torch.float32)
        encoder = models.text_encoder_module(load_text_encoder(REPOSITORY.text_encoder), CPU, torch.float32,
                                             Setting("torch"))
        self.pipeline = Flux2KleinPipeline(scheduler=models.scheduler(REPOSITORY.scheduler), vae=self.vae,
                                           text_encoder=encoder, tokenizer=models.tokenizer(REPOSITORY.tokenizer),
                                           transformer=None)
        statistics = self.vae.bn
        self.mean = statistics.running_mean[:, None, None]
        self.spread = (statistics.running_var + self.vae.config.batch_norm_eps).sqrt()[:, None, None]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        length = self.pipeline.tokenizer.model_max_length
        return self.pipeline.encode_prompt(prompts, device=CPU, max_sequence_length=length)[0]

    @torch.no_grad()
    def latent(self, pictures: torch.Tensor) -> torch.Tensor:
        mean = self.vae.encode(pictures).latent_dist.mean
        return (torch.nn.functional.pixel_unshuffle(mean, 2) - self.mean) / self.spread

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        mean = torch.nn.functional.pixel_shuffle(latent.float() * self.spread + self.mean, 2)
        return self.vae.decode(mean, return_dict=False)[0].clamp(-1, 1)


def unpadded(model, length: int):
    """A clone of a MODEL that sees the last ``length`` tokens of its conditioning. The host puts zeros before what is
    shorter than Klein's 512; the miniature was trained with the few that its tokenizer makes."""
    def cut(executor, x, timestep, context, *args, **kwargs):
        return executor(x, timestep, context[:, -length:], *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "miniature", cut)
    return model


def sampled(ends, model, prompts: list[str], **values) -> torch.Tensor:
    """Pictures by the nodes of the example workflow."""
    embeddings = ends.encode(prompts)
    model = unpadded(model, embeddings.shape[1])
    latent = {"samples": torch.zeros(len(prompts), 128, SIDE // 16, SIDE // 16)}
    out = SamplerCustomAdvanced.execute(
        RandomNoise.execute(0).result[0], BasicGuider.execute(model, [[embeddings, values]]).result[0],
        comfy.samplers.sampler_object("euler"), Flux2Scheduler.execute(STEPS, SIDE, SIDE).result[0], latent)
    return ends.decode(out.result[0]["samples"])
