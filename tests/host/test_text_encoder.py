"""The packed text encoder as a CLIP of the host: what users type, and where the host moves it."""

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import load_text_encoder
from bonsai_image.nodes import models, operations
from bonsai_image.nodes.operations import HostEmbedding
from bonsai_image.tests.support.reference import relative


@pytest.fixture(scope="module")
def encoder(repository):
    return str(repository / "text_encoder-mlx-4bit")


@pytest.fixture(scope="module")
def clip(encoder):
    return models.load_clip(encoder, "fp32")


def encode(clip, text):
    return clip.encode_from_tokens(clip.tokenize(text))


def test_empty_and_long_prompts(clip):
    assert encode(clip, "").shape == (1, 512, 7680)
    long = encode(clip, "a bonsai in a pot, " * 150)
    assert long.shape[1] > 512 and bool(torch.isfinite(long).all())


def test_prompt_weighting_is_plain_text_as_in_klein(clip):
    """The host switches weights off for this encoder; the brackets reach it as characters."""
    tokens = clip.tokenize("a (red:1.5) pot")
    assert {weight for batch in tokens["qwen3_4b"] for _, weight in batch} == {1.0}
    assert relative(encode(clip, "a (red:1.5) pot"), encode(clip, "a red pot")) > 1e-3


def test_embeddings_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    save_file({"qwen3_4b": torch.randn(3, 2560)}, tmp_path / "style.safetensors")
    clip = models.load_clip(encoder, "fp32")
    assert relative(encode(clip, "a pot, embedding:style"), encode(clip, "a pot, style")) > 1e-3


def test_offloaded_and_loaded_again(clip):
    before = encode(clip, "a bonsai")
    comfy.model_management.unload_all_models()
    assert torch.equal(encode(clip, "a bonsai"), before)


def test_a_dense_table_is_not_converted_whole(monkeypatch):
    """In FP32 that of Qwen3-4B would take 1.6 GB, twice a prompt."""
    table = HostEmbedding(7, 4)
    table.weight = torch.nn.Parameter(torch.randn(7, 4).half(), requires_grad=False)
    seen, lookup = [], operations.embedding
    monkeypatch.setattr(operations, "embedding", lambda *args: seen.append(args[1].dtype) or lookup(*args))
    rows = table(torch.tensor([[3, 1]]), out_dtype=torch.float32)
    assert torch.equal(rows, table.weight[[3, 1]].float()[None]) and rows.dtype == torch.float32
    assert seen == [torch.float16]


def test_bf16_products_stay_close(encoder, clip):
    fast = encode(models.load_clip(encoder, "bf16"), "a bonsai")
    assert fast.dtype == torch.float32 and relative(fast, encode(clip, "a bonsai")) < 0.05


def test_clone_for_another_device_reloads_the_file(clip):
    clone = clip.patcher.deepclone_multigpu(torch.device("cpu"))
    assert clone.model is not clip.patcher.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_that_are_left_out_change_nothing(encoder, clip, dtype):
    """Against ComfyUI with all layers of the file and the final norm, bit for bit."""
    loaded = load_text_encoder(encoder)
    assert loaded.config.num_hidden_layers == 28 and "model.norm.weight" in loaded.tensors
    whole = comfy.sd.load_text_encoder_state_dicts(
        [loaded.tensors], clip_type=comfy.sd.CLIPType.FLUX2, model_options={
            "custom_operations": operations.packed_operations(compute_dtype=dtype),
            "qwen3_4b_model_config": {**models.text_dimensions(loaded.config), "final_norm": True}})
    ours = models.load_clip(encoder, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    layers = {name.split(".")[4] for name, _ in ours.cond_stage_model.named_parameters() if ".layers." in name}
    assert len(layers) == 27 and ours.cond_stage_model.qwen3_4b.transformer.model.norm is None
    for text in ("", "a bonsai in a blue pot"):
        assert torch.equal(encode(ours, text), encode(whole, text))


def test_a_lora_on_a_layer_that_is_left_out_is_named(clip, caplog):
    """As without effect: nothing reads what the layer would change."""
    keys = [f"text_encoders.qwen3_4b.transformer.model.layers.{i}.mlp.up_proj.lora_{part}.weight"
            for i in (26, 27) for part in ("up", "down")]
    file = {key: torch.zeros((128, 2) if "up.weight" in key else (2, 2560)) for key in keys}
    with caplog.at_level("WARNING"):
        patched = comfy.sd.load_lora_for_models(None, clip, file, 0.0, 1.0)[1]
    assert len(patched.patcher.patches) == 1
    assert "layers.27" in caplog.text and "layers.26" not in caplog.text
