"""Bad input: every damaged, contradictory, foreign or hostile pack ends in PackError, and nothing in it runs.

Each case copies a small valid pack, damages the copy in one way, and loads it.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bonsai_image.loaders import PackError, comfy, dense, find_repository, gemlite, load_text_encoder
from bonsai_image.loaders import load_transformer, load_vae, mlx
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.loaders.names import to_comfyui
from bonsai_image.loaders.qwen3 import Qwen3Config
from bonsai_image.ops.codecs import to_hqq
from bonsai_image.ops.packed import equal, is_packed
from bonsai_image.standalone.miniature import random_text_encoder, random_transformer

KLEIN = KleinConfig(hidden=128, text_width=384, in_channels=32, out_channels=32, double_blocks=1, single_blocks=1)
TEXT = Qwen3Config(vocab=256, hidden=128, layers=28, heads=2, kv_heads=1, head_dim=64, mlp=128)
VAE = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 16,
       "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"

#: Pack -> its loader, its weight file, a dense matrix, and the stored codes, scale and shift of one packed layer.
TO_Q, QKV, UP = "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", "model.layers.3.mlp.up_proj"
PACKS = {
    "mlx": (load_transformer, WEIGHTS, "x_embedder.weight", f"{TO_Q}.weight", f"{TO_Q}.scales", f"{TO_Q}.biases"),
    "gemlite": (load_transformer, "state_dict.pt", "x_embedder.weight", f"{TO_Q}.W_q", f"{TO_Q}.scales",
                f"{TO_Q}.zeros"),
    "comfy": (load_transformer, "bonsai.safetensors", "img_in.weight", f"{QKV}.weight", f"{QKV}.weight_scale", None),
    "base3": (load_transformer, "bonsai.safetensors", "img_in.weight", f"{QKV}.weight", f"{QKV}.weight_scale", None),
    "unpacked": (load_transformer, WEIGHTS, "x_embedder.weight", None, None, None),
    "sharded": (load_transformer, "a.safetensors", "x_embedder.weight", None, None, None),
    "single": (load_transformer, "klein.safetensors", "img_in.weight", None, None, None),
    "te-mlx": (load_text_encoder, "model.safetensors", "model.norm.weight", f"{UP}.weight", f"{UP}.scales",
               f"{UP}.biases"),
    "te-hqq": (load_text_encoder, "qmodel.pt", "model.norm|weight", f"{UP}|W_q", f"{UP}|scale", f"{UP}|zero"),
    "te-dense": (load_text_encoder, "model.safetensors", "model.norm.weight", None, None, None),
    "vae": (load_vae, WEIGHTS, "decoder.conv_in.weight", None, None, None),
}


def _hqq(tensors: dict) -> dict:
    """The dict that hqq pickles, from affine 4-bit weights (their zero point is 7.5)."""
    result = {}
    for name, tensor in tensors.items():
        if not is_packed(tensor):
            result[name.removesuffix(".weight")] = {"weight": tensor.half()}
            continue
        scale = tensor._params.scale.half().view(-1, 1)
        result[name.removesuffix(".weight")] = {
            "W_q": to_hqq(tensor._qdata, 64), "scale": scale, "zero": torch.full_like(scale, 7.5), "nbits": 4,
            "group_size": 64, "shape": torch.Size(tensor.shape), "axis": 1, "packing": "4bit_u8",
            "compute_dtype": torch.float16, "quant_zero": False, "quant_scale": False, "view_as_float": False}
    return result


@pytest.fixture(scope="session")
def valid(tmp_path_factory) -> SimpleNamespace:
    """``root`` with a folder for each name in PACKS, and what each ``loaded`` to."""
    root = tmp_path_factory.mktemp("valid")
    for name in PACKS:
        (root / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    model, encoder = random_transformer(KLEIN, 2, generator), random_text_encoder(TEXT, generator)
    plain = {name: dense.expand(tensor) for name, tensor in model.items()}
    ours = to_comfyui(model)
    for name, tensors in (("mlx", mlx.encode(model)), ("comfy", comfy.encode(ours, False)), ("unpacked", plain),
                          ("base3", comfy.encode(ours, True)), ("single", to_comfyui(plain)),
                          ("te-mlx", mlx.encode(encoder)),
                          ("te-dense", {name: torch.zeros(tensor.shape) for name, tensor in encoder.items()})):
        save_file(tensors, root / name / PACKS[name][1], {"format": "pt"})
    torch.save(gemlite.encode(model), root / "gemlite" / "state_dict.pt")
    torch.save(_hqq(encoder), root / "te-hqq" / "qmodel.pt")
    shards = {"a.safetensors": sorted(plain)[::2], "b.safetensors": sorted(plain)[1::2]}
    if "x_embedder.weight" not in shards["a.safetensors"]:
        shards = dict(zip(shards, reversed(shards.values()), strict=True))
    for file, names in shards.items():
        save_file({name: plain[name] for name in names}, root / "sharded" / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (root / "sharded" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("mlx", "gemlite", "unpacked", "sharded"):
        (root / name / "config.json").write_text(json.dumps(KLEIN.diffusers()))
    for name in ("mlx", "gemlite"):
        (root / name / "quantization_config.json").write_text(json.dumps({"bits": 2, "group_size": 128}))
    for name in ("te-mlx", "te-hqq", "te-dense"):
        extra = {"quantization": {"bits": 4, "group_size": 64}} if name == "te-mlx" else {}
        (root / name / "config.json").write_text(json.dumps({**TEXT.transformers(), **extra}))
    AutoencoderKLFlux2(**VAE).bfloat16().save_pretrained(root / "vae")
    return SimpleNamespace(root=root, loaded={name: _load(name, root / name) for name in PACKS})


def _load(name: str, path: Path) -> dict[str, torch.Tensor]:
    loaded = PACKS[name][0](path)
    return loaded[0] if name == "vae" else loaded.tensors


def refusal(load, path) -> str:
    """The message of the PackError that ``load(path)`` raises: one sentence with the path, fit to be shown."""
    with pytest.raises(PackError) as info:
        load(path)
    message = str(info.value)
    assert str(path) in message
    sentence = message.replace(str(path), "")
    assert re.search(r": expected .+, found .+; .+\.$", sentence), message
    assert sentence.isprintable() and len(sentence) < 600, message
    assert not re.search(r"[.!?] +[A-Z]", sentence) and "Traceback" not in message, message
    # Nobody may be told to open a file with the restrictions off.
    assert "weights_only" not in message and "(...)" not in message, message
    return message


@pytest.fixture
def copy(valid, tmp_path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(valid.root / name, tmp_path / name))
    return copied


# Damaged bytes: refused, or read as exactly what was written.

def _table(file: Path) -> tuple[int, int]:
    """Where the table of tensors begins and ends: the header of a safetensors file, or the pickle in a zip."""
    if file.suffix == ".safetensors":
        return 0, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with zipfile.ZipFile(file) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        with archive.open(record):
            start = file.read_bytes().index(archive.read(record)[:64], record.header_offset)
        return start, start + record.file_size


def _unharmed(name: str, path: Path, valid: SimpleNamespace) -> bool:
    try:
        tensors = _load(name, path)
    except PackError:
        refusal(PACKS[name][0], path)
        return True
    original = valid.loaded[name]
    return tensors.keys() == original.keys() and all(
        equal(tensor, original[key]) if is_packed(tensor) else
        tensor.dtype == original[key].dtype and torch.equal(tensor, original[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("where", ["0", "1", "8", "9", "table/2", "table", "half", "end-1"])
@pytest.mark.parametrize("name", ["mlx", "comfy", "sharded", "te-dense", "vae", "gemlite", "te-hqq"])
def test_truncated(name, where, copy):
    path = copy(name)
    file = path / PACKS[name][1]
    size, (start, stop) = file.stat().st_size, _table(file)
    os.truncate(file, {"table/2": (start + stop) // 2, "table": stop, "half": size // 2, "end-1": size - 1}.get(
        where) or int(where if where.isdigit() else 0))
    refusal(PACKS[name][0], path)


@pytest.mark.parametrize("step", range(16))
@pytest.mark.parametrize("name", ["mlx", "comfy", "te-mlx", "vae", "gemlite", "te-hqq"])
def test_bit_flips_in_the_tensor_table(name, step, copy, valid):
    path = copy(name)
    file = path / PACKS[name][1]
    start, stop = _table(file)
    original = file.read_bytes()
    for i in range(3):
        place = step * 3 + i
        # The first bytes hold the header's length (safetensors) or the protocol (pickle); the rest is spread evenly.
        offset = start + (place if place < 8 else (stop - start) * place // 48)
        data = bytearray(original)
        data[offset] ^= 1 << (place * 3 % 8)
        file.write_bytes(data)
        assert _unharmed(name, path, valid), f"byte {offset}"


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/7", "version", "byteorder"])
@pytest.mark.parametrize("name", ["gemlite", "te-hqq"])
def test_bit_flips_in_a_zip_record(name, record, copy, valid):
    """In the local and central headers of a record (name, sizes, checksum, offset), and in the zip's last record."""
    path = copy(name)
    file = path / PACKS[name][1]
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
        assert _unharmed(name, path, valid), f"byte {offset - central} of the central header"


@pytest.mark.parametrize("length", [0, 1, 2**24, 2**31, 2**63, 2**64 - 1, -1, 1000])
def test_safetensors_header_length_lies(length, copy):
    path = copy("comfy") / "bonsai.safetensors"
    data = path.read_bytes()
    true = int.from_bytes(data[:8], "little")
    lie = {-1: true - 1, 1000: true + 1000}.get(length, length)
    path.write_bytes(lie.to_bytes(8, "little") + data[8:])
    refusal(load_transformer, path)


# Tensors that contradict each other, or are not those of the model.

def _read(file: Path) -> dict:
    if file.suffix == ".safetensors":
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    stored = torch.load(file, weights_only=True)
    if file.name != "qmodel.pt":
        return stored
    return {f"{module}|{key}": value for module, entry in stored.items() for key, value in entry.items()}


def _write(file: Path, tensors: dict) -> None:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return
    if file.name == "qmodel.pt":
        modules: dict = {}
        for name, value in tensors.items():
            module, _, key = name.partition("|")
            modules.setdefault(module, {})[key] = value
        tensors = modules
    torch.save(tensors, file)


def _first(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor
    return change


DAMAGE = {
    "missing": None,
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat((t, t[:1])),
    "transposed": lambda t: t.flatten()[None],
    "extra dimension": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "float64": lambda t: t.double(),
    "nan": _first(float("nan")),
    "infinity": _first(float("inf")),
}
ROLES = {"dense": 2, "codes": 3, "scale": 4, "shift": 5}
TENSOR_CASES = [(name, role, damage) for name in PACKS for role, column in ROLES.items() for damage in DAMAGE
                if PACKS[name][column] and not (role == "codes" and damage in ("nan", "infinity"))
                and not (damage == "complex" and name == "base3")]


@pytest.mark.parametrize(("name", "role", "damage"), TENSOR_CASES, ids=["-".join(case) for case in TENSOR_CASES])
def test_damaged_tensor(name, role, damage, copy):
    path = copy(name)
    file, target = path / PACKS[name][1], PACKS[name][ROLES[role]]
    tensors = _read(file)
    if DAMAGE[damage] is None:
        del tensors[target]
    else:
        tensors[target] = DAMAGE[damage](tensors[target])
    _write(file, tensors)
    refusal(PACKS[name][0], path)
