"""A format is one file and one entry: a toy one, registered from outside, is read, written, verified and offered."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bonsai_image.loaders import formats, load_transformer, targets
from bonsai_image.loaders.formats.interface import Format, Writer
from bonsai_image.ops.packed import is_packed, packed_weight, unpack_codes, unwrap
from bonsai_image.tests.support.command_line import BINARY, run


def read(path, mmap):
    """A NumPy archive of codes, one a byte, scales and dense tensors."""
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive}, {"toy.bits": "2"}


def matches(file):
    return file.metadata.get("toy.bits") == "2"


def decode(file):
    result = {}
    for name in file.each([name for name in file.tensors if not name.endswith(".scale")]):
        tensor = file.tensors[name]
        if tensor.dtype != torch.uint8:
            result[name] = tensor.bfloat16()
            continue
        codes = sum(tensor[:, i::4] << (2 * i) for i in range(4))
        result[name] = packed_weight(codes, file.tensors[f"{name}.scale"].bfloat16(), 2)
    return result


def write(path, tensors, config, about):
    arrays = {}
    for name, tensor in tensors.items():
        if not is_packed(tensor):
            arrays[name] = tensor.float().numpy()
            continue
        packed = unwrap(tensor)
        if (packed.bits, packed.form) != (2, "symmetric"):
            raise ValueError(f"{name}: toys are ternary, not {about.variant}")
        arrays |= {name: unpack_codes(packed.codes, 2).numpy(), f"{name}.scale": packed.scale.float().numpy()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


TOY = Format("toy", matches, decode, {"toy": Writer(write, (".npz",))}, readers={".npz": read})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (TOY, *formats.FORMATS))


def test_it_is_offered_written_verified_and_read(root, tmp_path, capsys):
    assert "toy" in targets()
    assert run("convert", root / "mlx", tmp_path / "a.npz", "--to", "toy") == 0
    loaded = load_transformer(tmp_path / "a.npz")
    assert (loaded.format, loaded.variant) == ("toy", "ternary")
    assert run("inspect", tmp_path / "a.npz") == 0
    assert "toy format, ternary" in capsys.readouterr().out
    assert run("convert", tmp_path / "a.npz", tmp_path / "back", "--to", "mlx") == 0
    file = "diffusion_pytorch_model.safetensors"
    back, original = load_file(tmp_path / "back" / file), load_file(root / "mlx" / file)
    assert back.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())


def test_its_file_in_a_folder_is_a_model(root, tmp_path):
    assert run("convert", root / "mlx", tmp_path / "transformer" / "a.npz", "--to", "toy") == 0
    assert load_transformer(tmp_path).format == load_transformer(tmp_path / "transformer").format == "toy"


def test_a_difference_after_writing_is_found(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (Format("toy", matches, lambda file: {
        name: -tensor if name == "x_embedder.weight" else tensor for name, tensor in decode(file).items()},
        TOY.writers, TOY.readers), *formats.FORMATS[1:]))
    assert run("convert", root / "mlx", tmp_path / "a.npz", "--to", "toy") == 2
    assert "difference after writing" in capsys.readouterr().err and not (tmp_path / "a.npz").exists()


def test_what_it_cannot_hold_is_refused_by_name(tmp_path, capsys):
    assert run("convert", BINARY, tmp_path / "a.npz", "--to", "toy") == 2
    assert "toys are ternary, not binary" in capsys.readouterr().err
