"""The miniature's diffusion model: FLUX.2 trained by flow matching at the noise levels that four steps visit, dense and
with ternary or binary weights (quantization-aware, straight-through)."""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.utils import parametrize

from bonsai_image.loaders.klein import KleinConfig, diffusers_shapes, is_packable
from bonsai_image.miniature.train.text import LENGTH, TEXT
from bonsai_image.miniature.train.training import train
from bonsai_image.ops.packed import pack_codes, packed_weight

KLEIN = KleinConfig(num_attention_heads=1, joint_attention_dim=3 * TEXT.hidden_size, num_layers=1, num_single_layers=4)
GROUP = 128
STEPS = 4
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
_BATCH = 32
_UNUSED = 0.01
#: One batch in so many is a reference edit.
_EDIT_EVERY = 4
#: FLUX.2's time coordinate of a reference image's tokens.
_REFERENCE_TIME = 10


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and BF16 scales (N, K / 128) of a weight: the scale is the group's mean magnitude, a ternary level
    the nearest of -1, 0, 1, a binary one the sign."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = grouped.abs().mean(2).clamp(min=1e-6).bfloat16()
    codes = grouped >= 0 if bits == 1 else (grouped / scale.float()[..., None]).round().clamp(-1, 1) + 1
    return codes.flatten(1).to(torch.uint8), scale


class FakeQuantised(torch.nn.Module):
    """A parametrisation: the quantized weight forwards, the identity backwards."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        codes, scale = quantize(weight.detach(), self.bits)
        levels = codes.float() * (2 if self.bits == 1 else 1) - 1
        exact = (levels.unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)
        return weight + (exact - weight.detach())


def tokens(latents: torch.Tensor) -> torch.Tensor:
    """(B, 128, H, W) to (B, H * W, 128)."""
    return latents.flatten(2).transpose(1, 2)


def positions(side: int, time: int = 0) -> torch.Tensor:
    """FLUX.2's coordinates (time, row, column, word) of a square of tokens."""
    axis = torch.arange(side)
    return torch.cartesian_prod(torch.tensor([time]), axis, axis, torch.tensor([0])).float()


def words() -> torch.Tensor:
    zero = torch.tensor([0])
    return torch.cartesian_prod(zero, zero, zero, torch.arange(LENGTH)).float()


def visited(side: int) -> torch.Tensor:
    """The noise levels of the pipeline's four steps at a size, from 1 down."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=compute_empirical_mu(side * side, STEPS))
    return scheduler.sigmas[:STEPS]


def new_transformer() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(**KLEIN.diffusers())


def velocity(model: Flux2Transformer2DModel, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
             reference: torch.Tensor | None = None) -> torch.Tensor:
    """The model on tokens (B, 64, 128) at noise levels (B,), with a reference's tokens beside them where given."""
    side = int(noisy.shape[1] ** 0.5)
    inputs, ids = noisy, positions(side)
    if reference is not None:
        inputs, ids = torch.cat([noisy, reference], 1), torch.cat([ids, positions(side, _REFERENCE_TIME)])
    out = model(hidden_states=inputs, encoder_hidden_states=text, timestep=sigma, img_ids=ids, txt_ids=words(),
                guidance=None, return_dict=False)[0]
    return out[:, :noisy.shape[1]]


def _is_matrix(name: str, _parameter: torch.Tensor) -> bool:
    return not name.startswith(("x_embedder", "proj_out")) and not name.endswith((".down", ".up"))


def _attention(clean: torch.Tensor) -> torch.Tensor:
    """The weight (B, 64) of each token's error: more on the objects, which are few tokens, than on the background."""
    background = clean.median(1, keepdim=True).values
    objects = (clean - background).norm(dim=2) > 2.0
    return (1 + 3 * objects) / 2


def train_transformer(folder: Path, name: str, model: Flux2Transformer2DModel, data: dict[str, torch.Tensor],
                      steps: int, lr: tuple[float, float]) -> None:
    """Train ``model`` on ``data`` (see ``train.prepare``; edits may be missing) in place."""
    levels = visited(int(data["latents"].shape[-1]))
    # The decoder ignores the channels that the VAE left unused, and so does the loss, all but a little.
    weight = data["signal"].clamp(min=_UNUSED)
    weight = weight / weight.sum()

    def loss(step: int) -> torch.Tensor:
        sigma = levels[torch.randint(0, STEPS, (_BATCH,))]
        sigma = (sigma + 0.02 * torch.randn(_BATCH)).clamp(0.02, 1)
        if "edit_target" in data and step % _EDIT_EVERY == 0:
            index = torch.randint(0, len(data["edit_target"]), (_BATCH,))
            clean, reference = (tokens(data["latents"][data[key][index]].float())
                                for key in ("edit_target", "edit_source"))
            text = data["text"][data["edit_caption"][index]].float()
        else:
            index = torch.randint(0, len(data["caption"]), (_BATCH,))
            clean, reference = tokens(data["latents"][index].float()), None
            text = data["text"][data["caption"][index]].float()
        noise = torch.randn_like(clean)
        t = sigma[:, None, None]
        out = velocity(model, t * noise + (1 - t) * clean, sigma, text, reference)
        error = (out - (noise - clean)).square() @ weight
        return (error * _attention(clean)).mean()

    train(folder, name, model, loss, steps, lr, _is_matrix)


def fake_quantize(model: Flux2Transformer2DModel, bits: int) -> Flux2Transformer2DModel:
    """Make every linear that Bonsai packs compute on its quantized weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and is_packable(f"{name}.weight"):
            parametrize.register_parametrization(module, "weight", FakeQuantised(bits))
    return model


def canonical(model: Flux2Transformer2DModel, bits: int | None) -> dict[str, torch.Tensor]:
    """Diffusers-named tensors: packed where Bonsai packs (``bits`` 1 or 2), BF16 elsewhere; all BF16 without bits."""
    result = {}
    for name in diffusers_shapes(KLEIN):
        layer = name.removesuffix(".weight")
        module = model.get_submodule(layer)
        if bits is None or not is_packable(name):
            result[name] = module.weight.detach().bfloat16()
        else:
            codes, scale = quantize(module.parametrizations.weight.original.detach(), bits)
            result[name] = packed_weight(pack_codes(codes, bits), scale, bits)
    return result

