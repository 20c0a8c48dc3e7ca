"""Train the miniature from nothing and write it: ``python miniature/train/train.py``.

Stages: VAE, text encoder, dense transformer, then binary and ternary ones that start from the dense one, and a LoRA. A
finished stage is kept in ``--work`` and an interrupted one goes on where it was; delete the folder to start anew.
"""

import argparse
import copy
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2

from bonsai_image.miniature.train import export, lora, text, transformer
from bonsai_image.miniature.train.measure import expected
from bonsai_image.miniature.train.scenes import COLOURS, Scene, draw, random_scene
from bonsai_image.miniature.train.training import loss_picture, save, train

VAE = {"block_out_channels": (8, 16, 32, 64), "layers_per_block": 1, "latent_channels": 32, "norm_num_groups": 1,
       "sample_size": 128}
STAGES = {"vae": 2000, "text": 300, "dense": 2300, "decoder": 600, "ternary": 1200, "binary": 2100, "lora": 200}
_PICTURES = 3000
_SCENES = 8000
_EDITS = 2500
_JITTER = 2
_KL = 0.1


def train_vae(folder: Path, steps: int) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**VAE)
    source = random.Random(0)
    pictures = torch.stack([draw(random_scene(source), source) for _ in range(_PICTURES)]).half()

    def loss(_step: int) -> torch.Tensor:
        x = pictures[torch.randint(0, _PICTURES, (8,))].float()
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        return error.abs().mean() + error.square().mean() + _KL * posterior.kl().mean() / x[0].numel()

    train(folder, "vae", vae, loss, steps, (0.02, 2e-3),
          lambda name, _: "conv_in" not in name and name != "decoder.conv_out.weight")
    return vae.eval().requires_grad_(False)


def train_decoder(folder: Path, vae: AutoencoderKLFlux2, dense: torch.nn.Module, data: dict[str, torch.Tensor],
                  steps: int) -> None:
    """Sharpen the decoder: half of its latents are the encoder's, half the dense transformer's last step towards them.

    The encoder stays as it is, and with it the latents that the transformers learn.
    """
    scenes = jittered(random.Random(_JITTER))[:_PICTURES]
    pictures = torch.stack([draw(scene, random.Random(seed)) for scene, seed in scenes]).half()
    spread = (data["variance"] + vae.config.batch_norm_eps).sqrt()
    last = transformer.visited(data["latents"].shape[-1])[-1]
    vae.decoder.requires_grad_(True)

    def loss(_step: int) -> torch.Tensor:
        index = torch.randint(0, _PICTURES, (8,))
        clean = transformer.tokens(data["latents"][index].float())
        noisy = last * torch.randn_like(clean[4:]) + (1 - last) * clean[4:]
        with torch.no_grad():
            flow = transformer.velocity(dense, noisy, last.expand(4), data["text"][data["caption"][index[4:]]].float())
        latents = torch.cat([clean[:4], noisy - last * flow]).mT.unflatten(2, data["latents"].shape[-2:])
        latents = torch.nn.functional.pixel_shuffle(latents * spread[:, None, None] + data["mean"][:, None, None], 2)
        error = vae.decode(latents).sample - pictures[index].float()
        return error.abs().mean() + error.square().mean()

    train(folder, "decoder", vae, loss, steps, (0.01, 1e-3), lambda name, _: name != "decoder.conv_out.weight")
    vae.requires_grad_(False)


@torch.no_grad()
def spread_latents(vae: AutoencoderKLFlux2) -> None:
    """Give every latent channel a mean and a variance of its own, at the same pictures.

    Training leaves all of them near 0 and 1, where statistics that get lost would not show. The scales are powers of
    two, which cost no precision.
    """
    channels, generator = vae.config.latent_channels, torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(-2, 3, (channels,), generator=generator)
    mean = torch.randint(-6, 7, (channels,), generator=generator) / 4
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    to_latent.weight[:channels] *= scale[:, None, None, None]
    to_latent.bias[:channels] = to_latent.bias[:channels] * scale + mean
    to_latent.bias[channels:] += 2 * scale.log()  # logarithms of variances
    from_latent.weight /= scale[:, None, None]
    from_latent.bias -= from_latent.weight[:, :, 0, 0] @ mean
    # The statistics are of 2 by 2 latents, side by side in the channels.
    scale, mean, eps = scale.repeat_interleave(4), mean.repeat_interleave(4), vae.config.batch_norm_eps
    vae.bn.running_mean.mul_(scale).add_(mean)
    vae.bn.running_var.add_(eps).mul_(scale**2).sub_(eps)


def edit_captions() -> dict[str, dict[str, str]]:
    return {f"make {what} {colour}": {"colour": colour, "edit": what}
            for what in ("it", "them", "the pot") for colour in COLOURS}


def training_scenes() -> list[Scene]:
    source = random.Random(1)
    return [random_scene(source) for _ in range(_SCENES)]


def jittered(source: random.Random) -> list[tuple[Scene, float]]:
    """The training scenes, each with the seed of its picture."""
    return [(scene, source.random()) for scene in training_scenes()]


def training_captions() -> dict[str, dict[str, str]]:
    """Every caption, with what it says."""
    said = {scene.caption(): expected(scene) for scene in training_scenes()}
    return dict(sorted(said.items())) | edit_captions()


@torch.no_grad()
def prepare(folder: Path, vae: AutoencoderKLFlux2, encoder: torch.nn.Module, tokenizer) -> dict[str, torch.Tensor]:
    """The training set, encoded once.

    ``latents`` (N, 128, 8, 8), normalised, of which the first belong to ``caption`` (row of ``text``); edits are
    triples of ``edit_source`` and ``edit_target`` (rows of ``latents``) and ``edit_caption``; ``signal`` (128,) is the
    share of a channel's variance that the picture fixes. Sets the VAE's batch norm to the statistics of the latents.
    """
    path = folder / "data.pt"
    if path.exists():
        data = torch.load(path, weights_only=True)
    else:
        captions = list(training_captions())
        row = {caption: i for i, caption in enumerate(captions)}
        source = random.Random(_JITTER)
        scenes, edits = jittered(source), []
        for index in range(_EDITS):
            scene, seed = scenes[index]
            colour = source.choice([name for name in COLOURS if name != scene.colour])
            edits.append((index, *scene.edit(colour), seed))
        pictures = [(scene, seed) for scene, seed in scenes] + [(scene, seed) for _, _, scene, seed in edits]
        latents, spreads = [], []
        for i in range(0, len(pictures), 32):
            batch = torch.stack([draw(scene, random.Random(seed)) for scene, seed in pictures[i:i + 32]])
            posterior = vae.encode(batch).latent_dist
            latents.append(torch.nn.functional.pixel_unshuffle(posterior.mean, 2))
            spreads.append(torch.nn.functional.pixel_unshuffle(posterior.var, 2).mean((0, 2, 3)))
        latents = torch.cat(latents)
        # Of drawn latents: a channel that the VAE left unused has mean 0 everywhere, and is not blown up.
        mean, signal = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        variance = signal + torch.stack(spreads).mean(0)
        data = {
            "latents": ((latents - mean[:, None, None]) / (variance + vae.config.batch_norm_eps).sqrt()[:, None, None]
                        ).half(),
            "mean": mean, "variance": variance, "signal": signal / variance,
            "text": text.encode(encoder, tokenizer, captions).half(),
            "caption": torch.tensor([row[scene.caption()] for scene, _ in scenes]),
            "edit_source": torch.tensor([index for index, *_ in edits]),
            "edit_target": torch.arange(len(edits)) + _SCENES,
            "edit_caption": torch.tensor([row[caption] for _, caption, _, _ in edits]),
        }
        save(data, path)
    vae.bn.running_mean.copy_(data["mean"])
    vae.bn.running_var.copy_(data["variance"])
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("miniature-work"), help="checkpoints and losses")
    parser.add_argument("--out", type=Path, default=Path("miniature"), help="what the repository keeps; replaced")
    parser.add_argument("--layouts", type=Path, help="also write every other published layout to this new folder")
    args = parser.parse_args()
    if args.out.exists() and not (args.out / export.REPOSITORY).is_dir():
        parser.error(f"{args.out} would be replaced, but is no miniature")
    args.work.mkdir(parents=True, exist_ok=True)

    vae = train_vae(args.work, STAGES["vae"])
    captions = training_captions()
    tokenizer = text.build_tokenizer(list(captions))
    language = text.train_text_encoder(args.work, tokenizer, captions, STAGES["text"])
    packed_encoder = text.quantized(language)
    encoder = text.encoder(packed_encoder)
    data = prepare(args.work, vae, encoder, tokenizer)

    dense = transformer.new_transformer()
    transformer.train_transformer(args.work, "dense", dense, data, STAGES["dense"], (0.02, 2e-3))
    train_decoder(args.work, vae, dense, data, STAGES["decoder"])
    models = {"dense": transformer.canonical(dense, None)}
    for name, bits in (("binary", 1), ("ternary", 2)):
        model = transformer.fake_quantize(copy.deepcopy(dense), bits)
        transformer.train_transformer(args.work, name, model, data, STAGES[name], (0.01, 1e-3))
        models[name] = transformer.canonical(model, bits)
    added = lora.train_lora(args.work, model, vae, encoder, tokenizer, data["signal"], STAGES["lora"])
    loss_picture(args.work, STAGES, args.work / "losses.png")
    spread_latents(vae)
    export.write(args.out, models, packed_encoder, tokenizer, vae, added)
    if args.layouts:
        export.write_layouts(args.out, args.layouts)


if __name__ == "__main__":
    main()
