"""ComfyUI's Train LoRA node on packed weights: the losses of dense weights, and a LoRA that does what it was shown."""

import random
from dataclasses import replace

import folder_paths
import pytest
import torch
from comfy_extras.nodes_train import SaveLoRA, TrainLoraNode

import nodes as host_nodes
from bonsai_image.miniature import demo
from bonsai_image.miniature.train.measure import describe
from bonsai_image.miniature.train.scenes import COLOURS, LEAVES, Scene, draw, random_scene
from bonsai_image.nodes import models
from bonsai_image.tests.support.miniature_in_comfyui import Ends, sampled, unpadded
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import conditioning, sample
from bonsai_image.tests.support.sampling import random as noise

IMAGES = 64
DEFAULTS = {
    "batch_size": 1, "grad_accumulation_steps": 1, "steps": 3, "learning_rate": 5e-3, "rank": 4, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
    "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1, "offloading": False,
    "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": True,
}


def train(model, latents: torch.Tensor, positive: list, **settings) -> tuple[dict, list[float]]:
    """The trained LoRA's tensors and the losses of its steps."""
    settings = {name: [value] for name, value in (DEFAULTS | settings).items()}
    torch.manual_seed(0)
    lora, losses, _ = TrainLoraNode.execute(model=[model], latents=[{"samples": latents}], positive=[positive],
                                            **settings).args
    return lora, losses["loss"]


@pytest.mark.parametrize("settings", [
    {"bypass_mode": True}, {"bypass_mode": False}, {"algorithm": "LoKr"}, {"checkpoint_depth": 2},
    {"training_dtype": "bf16", "lora_dtype": "bf16"}, {"training_dtype": "none"}, {"offloading": True}], ids=str)
def test_training_gives_the_losses_of_dense_weights(pair, settings):
    latents, positive = noise(2, 128, 4, 6, seed=8), [*conditioning(), *conditioning(5)]
    (lora, losses), (expected, dense) = (train(model, latents, positive, **settings) for model in pair)
    bf16 = "bf16" in settings.values() or settings.get("training_dtype") == "none"
    assert losses == pytest.approx(dense, rel=2e-2 if bf16 else 1e-5)
    assert len(set(losses)) == 3
    trained = [name for name in expected if "up" in name or "w1" in name]
    assert lora.keys() == expected.keys() and len(trained) > 10
    if not bf16:
        assert all(relative(lora[name], expected[name]) < 1e-2 for name in trained if expected[name].any())


def test_the_model_is_as_before_after_training(pair):
    before = sample(pair[0])
    train(pair[0], noise(2, 128, 4, 6, seed=8), [*conditioning(), *conditioning(5)])
    assert torch.equal(sample(pair[0]), before)


@pytest.fixture(scope="module")
def ends():
    return Ends()


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_a_lora_trained_on_blue_pots_makes_every_pot_blue(ends, variant, tmp_path, monkeypatch):
    """Trained by Train LoRA, saved by Save LoRA, used by Load LoRA: all ComfyUI's own. Everything but the pot stays."""
    model = models.load_model(str(demo.MINIATURE / demo.VARIANTS[variant]), "fp32")
    source = random.Random(7)
    scenes = [Scene("bonsai", source.choice(list(COLOURS)), random_scene(source).background,
                    leaves=source.choice(LEAVES)) for _ in range(IMAGES)]
    latents = ends.latent(torch.stack([draw(replace(scene, colour="blue"), source) for scene in scenes]))
    captions = ends.encode([scene.caption() for scene in scenes])
    lora, losses = train(unpadded(model, captions.shape[1]), latents, [[caption[None], {}] for caption in captions],
                         steps=60, grad_accumulation_steps=4)
    assert sum(losses[-40:]) < 0.9 * sum(losses[:40])

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    SaveLoRA.execute(lora, "blue", 60)
    file = next(tmp_path.glob("blue_*.safetensors")).name
    changed = host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, 1.0)[0]

    shown = [Scene("bonsai", colour, background, leaves=leaves) for colour, background, leaves in (
        ("red", "white", "green"), ("yellow", "grey", "pink"), ("green", "cream", "orange"),
        ("orange", "black", "green"), ("purple", "white", "red"), ("brown", "cream", "pink"))]
    images = [sampled(ends, each, [scene.caption() for scene in shown]) for each in (model, changed)]
    before, after = ([describe(image) for image in each] for each in images)
    assert sum(seen["colour"] == "blue" for seen in before) == 0
    assert sum(seen["colour"] == "blue" for seen in after) >= (6 if variant == "ternary" else 5)
    for name in ("leaves", "background", "shape"):
        assert sum(a[name] == b[name] for a, b in zip(before, after, strict=True)) >= 5
