"""Model files that are cut, or have flipped bits, end in ModelFileError. Each case damages a copy in one way."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from bonsai_image.loaders import ModelFileError, load_transformer
from bonsai_image.ops.packed import equal, is_packed
from bonsai_image.tests.support.sound_files import FILES, load, refusal


@pytest.fixture(scope="module")
def loaded(root) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load(name, root / name) for name in FILES}


def _table(file: Path) -> tuple[int, int]:
    """Where the table of tensors begins and ends: the header of a safetensors file, or the pickle in a zip."""
    if file.suffix == ".safetensors":
        return 0, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with zipfile.ZipFile(file) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        with archive.open(record):
            start = file.read_bytes().index(archive.read(record)[:64], record.header_offset)
        return start, start + record.file_size


def _unharmed(name: str, path: Path, original: dict[str, torch.Tensor]) -> bool:
    """Whether the model is refused properly, or loads to exactly the original tensors."""
    try:
        tensors = load(name, path)
    except ModelFileError:
        refusal(FILES[name][0], path)
        return True
    return tensors.keys() == original.keys() and all(
        equal(tensor, original[key]) if is_packed(tensor) else
        tensor.dtype == original[key].dtype and torch.equal(tensor, original[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("where", ["0", "1", "8", "9", "table/2", "table", "half", "end-1"])
@pytest.mark.parametrize("name", ["mlx", "comfy", "sharded", "te-dense", "vae", "gemlite", "te-hqq"])
def test_truncated(name, where, copy):
    path = copy(name)
    file = path / FILES[name][1]
    size, (start, stop) = file.stat().st_size, _table(file)
    os.truncate(file, {"table/2": (start + stop) // 2, "table": stop, "half": size // 2, "end-1": size - 1}.get(
        where) or int(where if where.isdigit() else 0))
    refusal(FILES[name][0], path)


@pytest.mark.parametrize("step", range(16))
@pytest.mark.parametrize("name", ["mlx", "comfy", "te-mlx", "vae", "gemlite"])
def test_bit_flips_in_the_tensor_table(name, step, copy, loaded):
    path = copy(name)
    file = path / FILES[name][1]
    start, stop = _table(file)
    original = file.read_bytes()
    for i in range(2):
        place = step * 2 + i
        # The first bytes hold the header's length (safetensors) or the protocol (pickle); the rest is spread evenly.
        offset = start + (place if place < 8 else (stop - start) * place // 32)
        data = bytearray(original)
        data[offset] ^= 1 << (place * 3 % 8)
        file.write_bytes(data)
        assert _unharmed(name, path, loaded[name]), f"byte {offset}"


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/7", "version", "byteorder"])
def test_bit_flips_in_a_zip_record(record, copy, loaded):
    """In the local and central headers of a record (name, sizes, checksum, offset), and in the zip's last record."""
    path = copy("gemlite")
    file = path / FILES["gemlite"][1]
    original = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"/{record}"))
        start = archive.start_dir
    central = original.index(info.filename.encode(), start) - 46
    places = [*range(info.header_offset + 4, info.header_offset + 34, 3), *range(central + 4, central + 58, 3)]
    places += range(len(original) - 20, len(original), 4) if record == "version" else ()
    for i, offset in enumerate(places):
        data = bytearray(original)
        data[offset] ^= 1 << (i * 3 % 8)
        file.write_bytes(data)
        assert _unharmed("gemlite", path, loaded["gemlite"]), f"byte {offset - central} of the central header"


@pytest.mark.parametrize("record", ["data/0", "data/7"])
def test_a_bit_flip_in_the_data_of_a_pickle(record, copy):
    """Codes and scales have no value that shows: only the checksum does."""
    path = copy("gemlite")
    file = path / FILES["gemlite"][1]
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith(f"/{record}")))
    data[data.index(content) + len(content) // 2] ^= 1
    file.write_bytes(data)
    refusal(FILES["gemlite"][0], path)


@pytest.mark.parametrize("length", [0, 1, 2**24, 2**31, 2**63, 2**64 - 1, -1, 1000])
def test_safetensors_header_length_lies(length, copy):
    path = copy("comfy") / "bonsai.safetensors"
    data = path.read_bytes()
    true = int.from_bytes(data[:8], "little")
    lie = {-1: true - 1, 1000: true + 1000}.get(length, length)
    path.write_bytes(lie.to_bytes(8, "little") + data[8:])
    refusal(load_transformer, path)
