"""Whole models over packed weights against the libraries' own modules over dense ones."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import ModelFileError, load_text_encoder, load_transformer
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.ops.packed import is_packed
from bonsai_image.standalone.models import scheduler, text_encoder_module, transformer_module, vae_module
from bonsai_image.tests.support import model_files
from bonsai_image.tests.support.reference import relative

CPU = torch.device("cpu")


def transformer_inputs(dtype: torch.dtype, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(5)
    height, width, text = 5, 3, 11
    one = torch.arange(1)
    return {
        "hidden_states": torch.randn(batch, height * width, 32, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 96, generator=generator).to(dtype),
        "timestep": torch.tensor([0.8, 0.3][:batch]).to(dtype),
        "img_ids": torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text)),
        "guidance": None,
        "return_dict": False,
    }


@pytest.mark.parametrize("kind", ["comfyui", "mlx"])
def test_transformer_equals_diffusers(small, kind):
    module = transformer_module(load_transformer(getattr(small, kind)), CPU, torch.float32)
    dense = copy.deepcopy(small.model).float()
    inputs = transformer_inputs(torch.float32)
    with torch.inference_mode():
        assert relative(module(**inputs)[0], dense(**inputs)[0]) < 1e-5


def test_transformer_in_bfloat16(small):
    module = transformer_module(load_transformer(small.mlx), CPU, torch.bfloat16)
    exact = copy.deepcopy(small.model).float()
    with torch.inference_mode():
        reference = exact(**transformer_inputs(torch.float32))[0]
        ours = module(**transformer_inputs(torch.bfloat16))[0]
        theirs = small.model(**transformer_inputs(torch.bfloat16))[0]
    assert relative(ours, reference) < 1.5 * relative(theirs, reference)


def test_every_block_linear_stays_packed(small):
    module = transformer_module(load_transformer(small.mlx), CPU, torch.float32)
    packed = {name for name, layer in module.named_modules() if isinstance(layer, PackedLinear)}
    assert packed == set(model_files.packed_names(small.model))
    assert all(is_packed(module.get_submodule(name).weight) for name in packed)
    held = sum(t.nbytes for t in module.state_dict().values() if t.dtype == torch.uint8)
    weights = sum(module.get_submodule(name).weight.numel() for name in packed)
    assert weights * small.bits / 8 <= held <= weights * small.bits / 8 + 200 * len(packed), "codes, and a tag a layer"


@pytest.mark.parametrize("kind", ["mlx", "hqq", "dense"])
def test_text_encoder_equals_transformers(tmp_path, kind):
    """The hidden states FLUX.2 Klein taps, from the same (dequantized) weights in transformers' own module."""
    model = model_files.text_model()
    if kind == "mlx":
        model_files.write_mlx_text_encoder(model, tmp_path / "encoder")
    elif kind == "hqq":
        model_files.write_hqq_text_encoder(tmp_path / "encoder")
    else:
        model.save_pretrained(tmp_path / "encoder")
    loaded, read = (load_text_encoder(tmp_path / "encoder", whole=whole) for whole in (True, False))
    # Neither the norm nor any layer after the last one tapped is there, or decoded.
    surplus = loaded.tensors.keys() - read.tensors.keys()
    assert {name.split(".")[1] for name in surplus} == {"norm", "layers"}
    assert {name.split(".")[2] for name in surplus} == {"27", "weight"} and read.config.num_hidden_layers == 27
    assert read.warnings == loaded.warnings
    module = text_encoder_module(read, CPU, torch.float32)
    dense = {name.removeprefix("model."): tensor.to(dtype=torch.float32).dequantize() if is_packed(tensor)
             else tensor.float() for name, tensor in loaded.tensors.items()}
    model.load_state_dict(dense)
    tokens = torch.randint(0, model_files.TEXT["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, 30:] = 0
    arguments = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    with torch.inference_mode():
        ours, theirs = module(**arguments).hidden_states, model(**arguments).hidden_states
    for layer in (9, 18, 27):
        assert relative(ours[layer], theirs[layer]) < 1e-5, layer


def test_layers_that_nobody_reads_may_be_damaged_or_missing(tmp_path):
    model = model_files.text_model()
    for name, tensor in model.state_dict().items():
        if name.startswith(("norm.", "layers.27.")):
            tensor.fill_(torch.nan)
    model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelFileError, match="finite numbers"):
        load_text_encoder(tmp_path / "encoder")
    read = load_text_encoder(tmp_path / "encoder", whole=False)
    save_file({name: tensor.contiguous() for name, tensor in read.tensors.items()}, tmp_path / "short.safetensors")
    again = load_text_encoder(tmp_path / "short.safetensors")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in read.tensors.items())
    assert again.config == read.config


def test_out_of_memory_is_not_reported_as_a_damaged_vae(repository, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        vae_module(repository / "vae", CPU, torch.float32)


def test_on_a_cpu_the_vae_computes_in_fp32(repository):
    assert {parameter.dtype for parameter in vae_module(repository / "vae", CPU, torch.bfloat16).parameters()} == {
        torch.float32}


def test_a_vae_of_other_sizes_needs_its_config(repository, tmp_path):
    vae = shutil.copytree(repository / "vae", tmp_path / "vae")
    (vae / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"a config\.json that describes the tensors"):
        vae_module(vae, CPU, torch.float32)


def test_without_a_scheduler_folder_it_is_that_of_klein():
    """``scheduler_config.json`` of FLUX.2 Klein 4B, which the class's defaults complete."""
    assert dict(scheduler(None).config).items() >= {
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": "exponential",
        "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}.items()
