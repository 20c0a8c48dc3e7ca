"""What goes wrong in a first graph ends in one sentence that says what to do."""

import importlib.util
import os
import shlex
import shutil
import subprocess

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch

from bonsai_image.loaders import ModelFileError
from bonsai_image.nodes import definitions as nodes
from bonsai_image.nodes import folders, models

TEXT_WIDTH = 3 * 2560
MISSING = "bonsai-image-binary-4B-mlx-1bit"


def one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and ". " not in text


def sample(model, latent: torch.Tensor, width: int = TEXT_WIDTH, **more) -> torch.Tensor:
    """One step of the host's own sampler; ``more`` goes with the conditioning."""
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    condition = [[torch.zeros(1, 8, width), more]]
    sampler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(model, torch.randn(latent.shape), 1.0, sampler, torch.tensor([1.0, 0.0]),
                                      condition, condition, latent, disable_pbar=True)


@pytest.fixture
def model(transformer):
    return models.load_model(str(transformer), "fp32")


def test_missing_checkpoint_error_has_the_command_of_this_installation(tmp_path, monkeypatch):
    folder = tmp_path / "with a space" / "diffusers"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(folder)], {"folder"}))

    def said(checkpoint: str) -> str:
        with pytest.raises(ValueError, match=r"\ARun ") as caught:
            nodes.BonsaiCheckpointLoader.execute(checkpoint)
        return str(caught.value)

    text = said(MISSING)
    assert one_sentence(text) and MISSING in text and "huggingface.co" in text
    command = shlex.split(text[len("Run "):text.index(" in a terminal")])
    assert command[-5:] == ["download", "--variant", "binary", "--to", str(folder)]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert shown.returncode == 0 and "--variant" in shown.stdout
    assert "--format gemlite" in said("bonsai-image-ternary-4B-gemlite-2bit").split("--to")[0]


def test_shell_command_for_windows_says_what_powershell_needs(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "name", "nt")
        plain = folders.shell_command(r"C:\ComfyUI\python.exe", r"C:\My Files\__main__.py", "download")
        spaced = folders.shell_command(r"C:\My Files\python.exe", "-m", "pip")
    assert plain == r'C:\ComfyUI\python.exe "C:\My Files\__main__.py" download'
    assert spaced == r'"C:\My Files\python.exe" -m pip (in PowerShell with & before it)'


@pytest.mark.parametrize("node", [nodes.BonsaiModelLoader, nodes.BonsaiTextEncoderLoader])
def test_a_missing_file_says_where_to_put_it(node):
    with pytest.raises(ValueError, match=r"\APut it there and press R") as caught:
        node.execute("gone.safetensors")
    text = str(caught.value)
    assert one_sentence(text.replace("gone.safetensors", "gone")) and "models/" in text


@pytest.mark.parametrize(("load", "part"), [(models.load_model, "vae"), (models.load_model, "text_encoder-mlx-4bit"),
                                            (models.load_clip, "transformer-packed-mflux"), (models.load_clip, "vae"),
                                            (models.load_vae_model, "transformer-packed-mflux")])
def test_wrong_kind_of_file(repository, load, part):
    with pytest.raises(ModelFileError, match=r"expected the .* of .*found the .* of Bonsai Image; choose") as caught:
        load(str(repository / part))
    assert "\n" not in str(caught.value)


def test_latent_of_another_model(model):
    with pytest.raises(ValueError, match=r"\AUse VAE Encode .*, or Empty Flux 2 Latent; this latent has 16") as caught:
        sample(model, torch.ones(1, 16, 8, 8))
    assert one_sentence(str(caught.value))


def test_reference_latent_of_another_model(model):
    with pytest.raises(ValueError, match=r"\AUse VAE Encode .*; this reference latent has 16 channels") as caught:
        sample(model, torch.zeros(1, 128, 4, 4), reference_latents=[torch.zeros(1, n, 4, 4) for n in (128, 16)])
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize("raised", [ModelFileError("a.gguf", "b", "c; d", "run x, or choose y; then z"),
                                    ModelFileError("a.gguf", "b", "c")])
def test_what_a_node_raises_begins_with_the_action(monkeypatch, raised):
    """ComfyUI shows the type of an error before its message, with its module unless that is builtins."""
    def fail(*_):
        raise raised

    monkeypatch.setattr(folders, "resolve", fail)
    monkeypatch.setattr(models, "describe", fail)
    for run in (lambda: nodes.BonsaiCheckpointLoader.execute("x"), lambda: nodes.BonsaiModelLoader.execute("x"),
                lambda: nodes.BonsaiTextEncoderLoader.execute("x"), lambda: nodes.BonsaiModelInfo.execute(None)):
        with pytest.raises(ValueError, match=rf"\A{raised.action.capitalize()}; a.gguf: expected b, found c") as caught:
            run()
        assert type(caught.value).__module__ == "builtins" and one_sentence(str(caught.value))
        assert str(caught.value).count(raised.action[1:]) == 1


def test_an_empty_latent_of_another_model_is_made_to_fit_by_the_host(model):
    assert sample(model, torch.zeros(1, 16, 4, 4)).shape == (1, 128, 4, 4)


def test_conditioning_of_another_text_encoder(model):
    with pytest.raises(ValueError, match=r"\AConnect the CLIP of a Bonsai loader; .*2560 wide.*takes 7680") as caught:
        sample(model, torch.zeros(1, 128, 4, 4), 2560)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(("batch", "advice"), [
    (3, r"\ASet batch_size to 1, or .*at 1024 x 512 with batch_size 3"),
    (1, r"\ATry a smaller size, such as 704 x 352, or .*at 1024 x 512 with batch_size 1"),
])
def test_out_of_memory_says_what_to_lower(model, monkeypatch, batch, advice):
    def exhausted(*args, **kwargs):
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model.model.diffusion_model, "_forward", exhausted)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=advice) as caught:
        sample(model, torch.zeros(batch, 128, 32, 64))
    assert one_sentence(str(caught.value))
    assert comfy.model_management.is_oom(caught.value), "the host must still see that memory ran out, and free it"


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_out_of_memory_in_the_vae_after_the_host_has_tried_tiles(repository, monkeypatch, method):
    vae = models.load_vae_model(str(repository / "vae"))
    calls = []

    def exhausted(*args, **kwargs):
        calls.append(1)
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(getattr(vae.first_stage_model, f"{method}r"), "forward", exhausted)
    given = torch.zeros(1, 64, 64, 3) if method == "encode" else torch.zeros(1, 128, 4, 4)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=r"\ALower .*--cpu-vae; .* VAE, which") as caught:
        getattr(vae, method)(given)
    assert len(calls) > 1 and one_sentence(str(caught.value)) and comfy.model_management.is_oom(caught.value)


@pytest.mark.parametrize("change", ["replaced", "truncated"])
def test_a_model_file_that_changes_is_noticed(change, transformer, repository, tmp_path, monkeypatch):
    """The node loads it again in the next prompt; a MODEL whose file is mapped computes nothing from another file."""
    for kind, source in (("diffusion_models", transformer), ("diffusers", repository)):
        shutil.copytree(source, tmp_path / kind / "mini")
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))

    def fingerprints():
        return (nodes.BonsaiModelLoader.fingerprint_inputs(model_name="mini", compute_dtype="auto"),
                nodes.BonsaiCheckpointLoader.fingerprint_inputs(checkpoint="mini"))

    seen, latent = fingerprints(), torch.zeros(1, 128, 4, 4)
    model = nodes.BonsaiModelLoader.execute("mini", compute_dtype="fp32").args[0].clone()
    sample(model, latent)
    assert fingerprints() == seen
    for file in (tmp_path / "diffusion_models/mini/diffusion_pytorch_model.safetensors",
                 tmp_path / "diffusers/mini/vae/diffusion_pytorch_model.safetensors"):
        if change == "truncated":
            os.truncate(file, 100_000)
        else:
            shutil.copy(file, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
    assert all(now != before for now, before in zip(fingerprints(), seen, strict=True))
    for use in (lambda: sample(model, latent), lambda: nodes.BonsaiSaveModel.execute(model, "mini", "packed")):
        with pytest.raises(ValueError, match=r"\ALoad the model again; .* one that has changed since"):
            use()


def _without(monkeypatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))


def _old_mlx(monkeypatch) -> None:
    mx = pytest.importorskip("mlx.core")
    product = mx.quantized_matmul

    def old(*args, **kwargs):
        if kwargs["bits"] == 1:
            raise ValueError("[quantized_matmul] the requested number of bits 1 is not supported")
        return product(*args, **kwargs)

    monkeypatch.setattr(mx, "quantized_matmul", old)
    monkeypatch.setattr(mx, "__version__", "0.28.0")


@pytest.mark.parametrize(("backend", "arrange", "said"), [
    ("gemlite", lambda patch: _without(patch, "gemlite"), "gemlite is not installed"),
    ("gemlite", lambda patch: _without(patch, "triton"), "is not installed"),
    ("triton", lambda patch: _without(patch, "triton"), "triton is not installed"),
    ("mlx", lambda patch: _without(patch, "mlx"), "mlx is not installed"),
    ("mlx", _old_mlx, "0.32.4 or newer is needed"),
])
def test_missing_or_outdated_backend_chosen_by_name(repository, monkeypatch, fresh_backends, backend, arrange, said):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(repository.parent)], {"folder"}))
    arrange(monkeypatch)
    with pytest.raises(ValueError, match=rf"\ASet backend to auto, or .*; the backend {backend} cannot be") as caught:
        nodes.BonsaiCheckpointLoader.execute(repository.name, backend=backend)
    assert said in str(caught.value) and one_sentence(str(caught.value))
    nodes.BonsaiCheckpointLoader.execute(repository.name)


def test_a_size_that_is_no_multiple_of_16_is_rounded_down_by_the_host():
    from comfy_extras.nodes_flux import EmptyFlux2LatentImage

    assert EmptyFlux2LatentImage.execute(1000, 1031).args[0]["samples"].shape == (1, 128, 64, 62)
