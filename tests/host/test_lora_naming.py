"""LoRA files in the naming of every tool: what ComfyUI's loaders take of them, packed and dense; files of other models;
and the table of this in docs/lora.md."""

import logging
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sd
import pytest
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import load_lora, save_lora
from bonsai_image.nodes import models
from bonsai_image.nodes.operations import HostLinear
from bonsai_image.tests.support import loras
from bonsai_image.tests.support.adapters import Maker, with_lora
from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import host_forward, sample

DOCS = Path(__file__).parents[2] / "docs" / "lora.md"
ROWS = {"LoRA": "lora", "LoKr": "lokr_decomposed", "LoHa": "loha", "DoRA": "dora"}


def made(naming, kind, tensors, path):
    """A file, the same in the naming of convert --to comfy-lora, and what was read of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapters = loras.content(loras.NAMINGS[naming], kind, shapes, Maker(seed=5))
    save_file({name: t.contiguous() for name, t in loras.written(loras.NAMINGS[naming], adapters).items()},
              path / "lora.safetensors")
    found = load_lora(path / "lora.safetensors")
    (path / "comfy.safetensors").unlink(missing_ok=True)
    save_lora(found, path / "comfy.safetensors")
    return load_file(path / "lora.safetensors"), load_file(path / "comfy.safetensors"), found


def unread(model, file) -> list[str]:
    """The tensors of ``file`` that ComfyUI's loader does not read, whatever it does with alpha."""
    adapters = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    read = set().union(*(adapter.loaded_keys for adapter in adapters.values()))
    return [name for name in file if name not in read and not name.endswith((".alpha", ".diff"))]


@pytest.mark.parametrize("naming", loras.NAMINGS)
def test_packed_is_dense_in_every_naming(packed_model, dense_model, tensors, inputs, naming, tmp_path):
    file, converted, found = made(naming, "lora", tensors, tmp_path)
    plain = host_forward(dense_model, inputs)
    expected = host_forward(with_lora(dense_model, converted, 0.7), inputs)
    assert relative(expected, plain) > 1e-3
    assert relative(host_forward(with_lora(packed_model, converted, 0.7), inputs), expected) < 1e-4
    if not found.ignored:
        assert relative(host_forward(with_lora(packed_model, file, 0.7), inputs), expected) < 1e-4


def cell(model, naming, kind, tensors, path) -> str:
    """What ComfyUI's loaders do with the file as it is."""
    file, converted, found = made(naming, kind, tensors, path)
    assert not found.unknown and not unread(model, converted), "convert --to comfy-lora writes what ComfyUI reads"
    names = unread(model, file)
    assert bool(found.ignored) == bool(names)
    if all(name.endswith("magnitude_vector") for name in names):
        return "as a plain LoRA; convert" if names else "yes"
    return "ignored; convert" if len(names) == sum(not name.endswith(".alpha") for name in file) else "in part; convert"


def test_the_table_in_the_docs(packed_model, tensors, tmp_path):
    """``docs/lora.md`` has what this test finds; on a difference, the message has the lines to put there."""
    lines = [f"| naming | {' | '.join(ROWS)} |", "|---" * (len(ROWS) + 1) + "|"]
    for naming in loras.NAMINGS:
        cells = [cell(packed_model, naming, kind, tensors, tmp_path) for kind in ROWS.values()]
        lines.append(f"| {naming} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    assert table in DOCS.read_text(encoding="utf-8"), table


def wide(tensors):
    """A LoRA of a model twice as wide."""
    maker = Maker(tensors)
    maker.shapes = {layer: (2 * n, 2 * k) for layer, (n, k) in maker.shapes.items()}
    return maker


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha", "glora", "oft", "boft", "diff"])
def test_a_lora_of_another_size_is_one_sentence_and_no_work(transformer, tensors, kind, caplog):
    model = models.load_model(str(transformer), "fp32")
    with caplog.at_level(logging.WARNING):
        patched = with_lora(model, wide(tensors).file(kind))
        sample(patched, steps=1)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Bonsai Image: a LoRA has no effect on 5 weights, which have another shape in this model (first: "
        "diffusion_model.img_in.weight); choose one made for FLUX.2 Klein 4B."]
    assert not any(layer.adapters.paths for layer in patched.model.modules() if isinstance(layer, HostLinear))
    assert "patches on 0 weights" in models.describe(patched)


def test_what_fits_of_a_lora_is_applied(packed_model, dense_model, tensors, inputs):
    """Beside layers that do not fit, and a LoRA that fits beside one that does not."""
    file, other = Maker(tensors).file("lora"), wide(tensors).file("lora")
    mixed = {name: other[name] if "single_blocks" in name else tensor for name, tensor in file.items()}
    fitting = {name: tensor for name, tensor in file.items() if "single_blocks" not in name}
    expected = host_forward(with_lora(dense_model, fitting), inputs)
    patched = with_lora(with_lora(packed_model, mixed), other)
    assert relative(host_forward(patched, inputs), expected) < 1e-4
    assert len(patched.patches) == 3


@pytest.mark.parametrize("function", [
    lambda original: lambda patches, weight, key, intermediate_dtype=None: original(patches, weight, key),
    lambda original: lambda patches, weight, key: original(patches, weight, key),
    lambda original: lambda *args, **kwargs: original(*args, **kwargs),
], ids=["without originals", "without dtype", "any"])
def test_a_replaced_function_of_comfyui_gets_what_it_takes(packed_model, dense_model, tensors, inputs, monkeypatch,
                                                           function):
    file = Maker(tensors).file("oft")
    expected = host_forward(with_lora(dense_model, file), inputs)
    patched = with_lora(packed_model, file)
    comfy.model_management.load_models_gpu([patched])
    monkeypatch.setattr(comfy.lora, "calculate_weight", function(comfy.lora.calculate_weight))
    assert relative(host_forward(patched, inputs), expected) < 1e-4
