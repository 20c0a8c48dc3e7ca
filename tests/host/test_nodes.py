"""What the nodes promise about a MODEL: weights in, weights out, one model not disturbing another."""

import gc
import shutil
import weakref

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch

from bonsai_image.loaders import ModelFileError, load_transformer
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.nodes import definitions as nodes
from bonsai_image.nodes import folders as node_folders
from bonsai_image.nodes import models
from bonsai_image.ops import backends
from bonsai_image.ops.backends import selfcheck
from bonsai_image.ops.packed import PackedLayout, equal, is_packed, packed_nbytes, unwrap
from bonsai_image.tests.support import random_model
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward


@pytest.fixture
def folders(tmp_path, monkeypatch, repository):
    """models/* and output under a temporary root, with the miniature repository downloaded into it."""
    for kind in ("diffusers", "diffusion_models", "text_encoders"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "diffusers" / repository.name).symlink_to(repository, target_is_directory=True)
    return tmp_path


def test_checkpoint_loader_gives_the_hosts_own_types(folders, repository):
    import comfy.model_patcher
    import comfy.sd

    assert node_folders.checkpoint_choices() == [repository.name]
    model, clip, vae = nodes.BonsaiCheckpointLoader.execute(repository.name, compute_dtype="fp32").args
    assert isinstance(model, comfy.model_patcher.ModelPatcher) and type(model) is comfy.model_patcher.ModelPatcher
    assert isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)


def test_choices_are_files_and_folders(folders, transformer):
    (folders / "diffusion_models" / "mini").symlink_to(transformer, target_is_directory=True)
    choices = node_folders.file_choices("diffusion_models")
    assert choices == ["mini", "mini/diffusion_pytorch_model.safetensors"]
    for choice in choices:
        for name in (choice, choice.replace("/", "\\")):  # as a workflow made on Windows has it
            assert load_transformer(node_folders.resolve("diffusion_models", name)).variant == "ternary"
    with pytest.raises(ModelFileError, match="press R"):
        node_folders.resolve("diffusion_models", "../diffusers")
    with pytest.raises(ModelFileError, match="press R"):
        node_folders.resolve("diffusion_models", "..\\diffusers")


@pytest.mark.parametrize("storage", ["packed", "base3"])
def test_save_node_writes_what_was_loaded(folders, transformer, storage):
    model = models.load_model(str(transformer), "fp32")
    for _ in range(2):  # a second save takes the next free name
        nodes.BonsaiSaveModel.execute(model, "diffusion_models/mini", storage)
    saved = sorted((folders / "output" / "diffusion_models").iterdir())
    assert [path.name for path in saved] == ["mini_00001_.safetensors", "mini_00002_.safetensors"]
    original, again = to_comfyui(load_transformer(transformer).tensors), load_transformer(saved[0]).tensors
    assert all(equal(again[name], tensor) if is_packed(tensor) else torch.equal(again[name], tensor)
               for name, tensor in original.items())


def test_save_node_refuses_a_model_that_is_not_ours(folders, transformer):
    model = models.load_model(str(transformer), "fp32")
    model.remove_attachments(models.ATTACHMENT)
    with pytest.raises(ValueError, match=r"\AUse Save Model; .*Bonsai loader"):
        nodes.BonsaiSaveModel.execute(model, "x", "packed")


def test_save_node_names_the_input_that_is_wrong(binary_transformer):
    with pytest.raises(ValueError, match=r"\ASet storage to packed; .* this MODEL is binary\.\Z"):
        nodes.BonsaiSaveModel.execute(models.load_model(str(binary_transformer)), "x", "base3")


def test_clip_and_vae_are_shared_while_they_exist_and_their_files_stay(folders, repository, monkeypatch):
    """Another precision makes ComfyUI run the loader again, and the prompt with it."""
    shutil.copytree(repository, folders / "diffusers" / "mine")

    def load(**compute):
        return nodes.BonsaiCheckpointLoader.execute("mine", **compute).args

    model, clip, vae = load()
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a bonsai"))
    (encoded, more), = conditioning
    more["changed"] = True
    other, same, same_vae = load(precision="fast")
    assert other is not model and same is clip and same_vae is vae
    with monkeypatch.context() as patch:
        patch.setattr(clip.cond_stage_model, "encode_token_weights", None)
        (again, more), = same.encode_from_tokens_scheduled(same.tokenize("a bonsai"))
    assert again is encoded and "changed" not in more
    assert not torch.equal(clip.encode_from_tokens_scheduled(clip.tokenize("another"))[0][0], encoded)
    patched = clip.clone()
    assert patched.encode_from_tokens_scheduled(patched.tokenize("another"))[0][0] is not encoded
    file = folders / "diffusers" / "mine" / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    *_, kept, reloaded = load()
    assert kept is clip and reloaded is not vae
    seen = weakref.ref(clip)
    del model, other, clip, same, kept, patched
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert seen() is None


def test_progress_covers_all_parts_and_the_prompt(folders, repository, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, *_, **__: seen.append(value / total))
    *_, clip, _ = nodes.BonsaiCheckpointLoader.execute(repository.name).args
    assert seen == sorted(seen) and seen[-1] == 1 and any(1 / 3 <= value < 0.7 for value in seen)
    for prompt in ("one", "two"):
        seen.clear()
        clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        assert seen == sorted(seen) and seen[0] < 0.1 and seen[-1] == 1
    loaded = nodes.BonsaiCheckpointLoader.execute(repository.name)
    assert loaded.args[1] is clip and seen[-1] == 1


def test_text_encoder_on_the_cpu(folders, repository, monkeypatch):
    """As ComfyUI's own Load CLIP has it; another place is another CLIP."""
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: torch.device("meta"))
    (folders / "text_encoders" / "mini").symlink_to(repository / "text_encoder-mlx-4bit")
    clip, = nodes.BonsaiTextEncoderLoader.execute("mini", "cpu").args
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    assert next(clip.cond_stage_model.parameters()).device.type == "cpu"


def test_info_says_what_was_asked_for_and_names_the_parts(transformer):
    model = models.load_model(str(transformer), "bf16", backends.Setting("torch", "fast"))
    output = nodes.BonsaiModelInfo.execute(model)
    text, = output.args
    assert output.ui.as_dict() == {"text": (text,)} and str(transformer.parent.parent) not in text
    assert "asked for: compute_dtype bf16, backend torch, precision fast\n" in text
    assert "backend torch (fast means exact here)" in text
    text = models.describe(model := models.load_model(str(transformer), "bf16"))
    packed = [p for p in model.model.diffusion_model.parameters() if is_packed(p)]
    assert f"size: {sum(map(packed_nbytes, packed)) / 1e6:.1f} MB packed" in text
    backend = backends.choose(backends.AUTO, model.load_device, 4608, unwrap(packed[0]), torch.bfloat16)
    for part in ("ternary", "mlx", "bfloat16", f"{len(packed)} linears of 2 bits in groups of 128, backend {backend}",
                 "bonsai-mini-ternary"):
        assert part in text


def test_info_says_that_a_self_check_failed(transformer, monkeypatch, fresh_backends):
    monkeypatch.setattr(selfcheck, "worst_error", lambda backend, *_: 7.0 if backend.NAME == "cpu" else 0.0)
    text = nodes.BonsaiModelInfo.execute(models.load_model(str(transformer), "bf16")).args[0]
    assert "backend torch (" in text
    assert "fails the self-check of the backend cpu on cpu (2 bits, symmetric: 7.0 times the tolerance)" in text


def test_host_counts_codes_and_scales(transformer):
    model = models.load_model(str(transformer), "fp32")
    parameters = list(model.model.diffusion_model.named_parameters())
    packed = sum(packed_nbytes(p) for _, p in parameters if is_packed(p))
    dense = sum(p.nbytes for _, p in parameters if not is_packed(p))
    tags = sum(t.nbytes for name, t in model.model.state_dict().items() if name.endswith("comfy_quant"))
    assert comfy.model_management.module_size(model.model.diffusion_model) == packed + dense + tags


def test_sampling_runs_the_packed_kernel_for_every_linear(transformer, inputs, monkeypatch):
    model = models.load_model(str(transformer), "fp32")
    calls = []
    original = backends.multiply
    monkeypatch.setattr(backends, "multiply", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(PackedLayout, "dequantize", None)
    host_forward(model, inputs)
    assert len(calls) == sum(is_packed(p) for p in model.model.diffusion_model.parameters())


def test_two_models_with_different_settings_do_not_disturb_each_other(transformer, binary_transformer, inputs):
    first = models.load_model(str(transformer), "fp32")
    alone = host_forward(first, inputs)
    second = models.load_model(str(binary_transformer), "bf16")
    other = host_forward(second, inputs)
    assert torch.equal(host_forward(first, inputs), alone)
    assert torch.equal(host_forward(second, inputs), other)
    assert second.model.get_dtype_inference() == torch.bfloat16


def test_bf16_is_close_to_fp32(transformer, inputs):
    exact = host_forward(models.load_model(str(transformer), "fp32"), inputs)
    latent, sigma, context = inputs
    half = host_forward(models.load_model(str(transformer), "bf16"), (latent.bfloat16(), sigma, context.bfloat16()))
    assert half.dtype == torch.bfloat16 and relative(half, exact) < 0.05


def test_clone_for_another_device_reloads_the_file(transformer, inputs):
    model = models.load_model(str(transformer), "fp32")
    expected = host_forward(model, inputs)
    clone = model.deepclone_multigpu(torch.device("cpu"))
    assert clone.model is not model.model
    assert torch.equal(host_forward(clone, inputs), expected)


def test_a_vae_cloned_for_another_device_decodes_with_its_own_weights(repository):
    vae = models.load_vae_model(str(repository / "vae"))
    latent = torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latent)
    clone = vae.patcher.deepclone_multigpu(torch.device("cpu"))
    comfy.model_management.load_models_gpu([clone])
    with torch.no_grad():
        for parameter in vae.first_stage_model.parameters():
            parameter.zero_()
    assert clone.model is not vae.first_stage_model
    vae.patcher, vae.first_stage_model = clone, clone.model
    assert torch.equal(vae.decode(latent), expected)


def test_cancel_is_noticed_inside_a_step(transformer, inputs):
    model = models.load_model(str(transformer), "fp32")
    expected = host_forward(model, inputs)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host_forward(model, inputs)
    assert torch.equal(host_forward(model, inputs), expected)


def test_text_encoder_of_another_width_is_refused(tmp_path):
    folder = random_model.write_repository(tmp_path / "narrow") / "text_encoder-mlx-4bit"
    with pytest.raises(ModelFileError, match="128 wide"):
        models.load_clip(str(folder))


def test_schemas_are_complete():
    for node in (nodes.BonsaiCheckpointLoader, nodes.BonsaiModelLoader, nodes.BonsaiTextEncoderLoader,
                 nodes.BonsaiSaveModel, nodes.BonsaiModelInfo):
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__ and schema.description
        assert all(entry.tooltip for entry in schema.inputs), schema.node_id
