"""GGUF: what is written is read back to the last bit, by us, by the ``gguf`` package and by ggml itself; what others
write is read as it is; and what is damaged or rounded is refused before anything is allocated."""

import re
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gguf as package
import numpy as np
import pytest
import torch

from bonsai_image.loaders import gguf, load_transformer, save_transformer
from bonsai_image.loaders.formats import gguf as formats_gguf
from bonsai_image.loaders.names import to_comfyui, to_diffusers
from bonsai_image.ops.packed import equal, is_packed, unwrap
from bonsai_image.standalone.cli import main
from bonsai_image.tests.support import model_files
from bonsai_image.tests.support.ggml import Ggml
from bonsai_image.tests.support.sound_files import refusal

QKV = "double_blocks.0.img_attn.qkv.weight"
TARGETS = [(1, "gguf"), (2, "gguf"), (2, "gguf-pq2_0"), (2, "gguf-ptq1_0")]
each_target = pytest.mark.parametrize(("small_model", "target"), TARGETS, ids=["Q1_0", "Q2_0", "PQ2_0", "PTQ1_0"],
                                      indirect=["small_model"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, SimpleNamespace]:
    """By bits: ``loaded`` from an unpacked folder, and ``dense``, the values in FP32 by ComfyUI's names."""
    result = {}
    for bits in (1, 2):
        model = model_files.dense_model(bits)
        folder = model_files.write_diffusers(model, tmp_path_factory.mktemp(f"unpacked{bits}"))
        dense = {name: tensor.float() for name, tensor in to_comfyui(dict(model.state_dict())).items()}
        result[bits] = SimpleNamespace(bits=bits, loaded=load_transformer(folder), dense=dense)
    return result


@pytest.fixture
def small_model(models, request) -> SimpleNamespace:
    return models[request.param]


def stored(name: str) -> str:
    """The name in the file."""
    return name.replace("_norm.weight", "_norm.scale")


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype=torch.float32).dequantize() if is_packed(tensor) else tensor.float()


def community_file(path: Path, dense: dict[str, torch.Tensor], prefix: str) -> Path:
    """A binary file as the community has them, by the ``gguf`` package: Q1_0 from bits that NumPy packs, norms in FP32
    and called ``.scale``, modulations in Q8_0, all else in BF16."""
    writer = package.GGUFWriter(path, "flux")
    for name, tensor in dense.items():
        array = tensor.numpy()
        if "blocks" in name and array.ndim == 2:
            groups = array.reshape(array.shape[0], -1, 128)
            bits = np.packbits(groups > 0, axis=-1, bitorder="little")
            scales = np.abs(groups[..., :1]).astype(np.float16).view(np.uint8)
            rows = np.concatenate((scales, bits), axis=-1).reshape(array.shape[0], -1)
            writer.add_tensor(prefix + stored(name), rows, raw_dtype=package.GGMLQuantizationType.Q1_0)
        elif array.ndim == 1:
            writer.add_tensor(prefix + stored(name), array)
        else:
            kind = package.GGMLQuantizationType.Q8_0 if "modulation" in name else package.GGMLQuantizationType.BF16
            writer.add_tensor(prefix + stored(name), package.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@each_target
def test_round_trip(small_model, target, tmp_path):
    """GGUF -> comfy -> MLX -> GGUF: the same bytes, header and all."""
    source, path = small_model.loaded, tmp_path / "first.gguf"
    source.metadata["bonsai.source"] = "prism-ml/bonsai@1"
    save_transformer(source, path, target)
    model = load_transformer(path)
    assert (model.format, model.variant, model.source) == ("gguf", source.variant, source.source)
    for between, step in (("comfy", tmp_path / "between.safetensors"), ("mlx", tmp_path / "between")):
        save_transformer(model, step, between)
        model = load_transformer(step)
    model.metadata["bonsai.source"] = source.source  # MLX files do not say
    save_transformer(model, tmp_path / "last.gguf", target)
    assert (tmp_path / "last.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("small_model", "target"), TARGETS[:3], ids=["Q1_0", "Q2_0", "PQ2_0"],
                         indirect=["small_model"])
def test_layout(small_model, target, tmp_path):
    """The bytes on disk, taken apart with NumPy as the sources of ggml and of PrismML's fork describe the blocks."""
    save_transformer(small_model.loaded, tmp_path / "model.gguf", target)
    weights, bits = {"gguf": {1: (128, 1), 2: (64, 2)}, "gguf-pq2_0": {2: (128, 2)}}[target][small_model.bits]
    data, contents = (tmp_path / "model.gguf").read_bytes(), gguf.read_header(tmp_path / "model.gguf")
    entry, expected = contents.entries[QKV], small_model.dense[QKV].numpy()
    block = np.dtype([("d", "<f2"), ("codes", "u1", weights * bits // 8)])
    blocks = np.frombuffer(data, block, expected.size // weights, contents.start + entry.offset)
    element = np.arange(weights)
    codes = blocks["codes"][:, element * bits // 8] >> (element * bits % 8) & (2**bits - 1)
    levels = codes.astype(np.float32) - 1 if bits == 2 else np.where(codes == 1, 1, -1)
    assert np.array_equal((blocks["d"][:, None].astype(np.float32) * levels).reshape(expected.shape), expected)


def ptq1_0(block: np.ndarray) -> list[int]:
    """The levels of one block, as PrismML's ``dequantize_row_ptq1_0`` walks over its bytes."""
    levels, at = [], 0
    for width, digits in ((16, 5), (8, 5), (2, 4)):
        levels += [((int(block[at + m]) * 3**n & 255) * 3 >> 8) - 1 for n in range(digits) for m in range(width)]
        at += width
    return levels


@pytest.mark.parametrize("small_model", [2], indirect=True)
def test_layout_of_ptq1_0(small_model, tmp_path):
    """28 bytes for 128 weights, the scale last. Every byte of base 3 that PrismML's quantizer writes comes back."""
    save_transformer(small_model.loaded, tmp_path / "model.gguf", "gguf-ptq1_0")
    contents, expected = gguf.read_header(tmp_path / "model.gguf"), small_model.dense[QKV].numpy()
    data = np.fromfile(tmp_path / "model.gguf", np.uint8, offset=contents.start + contents.entries[QKV].offset)
    blocks = data[:expected.size // 128 * 28].reshape(-1, 28)
    levels = np.array([ptq1_0(block) for block in blocks])
    scales = np.ascontiguousarray(blocks[:, 26:]).view("<f2").astype(np.float32)
    assert np.array_equal((levels * scales).reshape(expected.shape), expected)
    every = (torch.arange(243) * 256 + 242).div(243, rounding_mode="floor").byte()
    packed = every[torch.arange(10 * 26) % 243].view(1, 10, 26)
    packed[..., 24:] = every[torch.arange(0, 60, 3)].view(1, 10, 2)
    assert torch.equal(formats_gguf._to_base3(formats_gguf._from_base3(packed)), packed)


@pytest.mark.parametrize("small_model", [2], indirect=True)
def test_type_42_in_groups_of_128(small_model, tmp_path):
    """Older files of PrismML: the blocks of PQ2_0 under the number of Q2_0, told by the room that they fill."""
    path = tmp_path / "model.gguf"
    save_transformer(small_model.loaded, path, "gguf-pq2_0")
    model = load_transformer(path)
    number = struct.pack("<I", 142)
    data, start = bytearray(path.read_bytes()), gguf.read_header(path).start
    for name, entry in gguf.read_header(path).entries.items():
        if entry.type is gguf.PQ2_0:
            at = data.index(name.encode() + struct.pack("<I", 2)) + len(name) + 20
            assert data[at : at + 4] == number and at < start
            data[at : at + 4] = struct.pack("<I", 42)
    path.write_bytes(data)
    older = load_transformer(path).tensors
    assert all(equal(older[name], tensor) for name, tensor in model.tensors.items() if is_packed(tensor))
    path.write_bytes(data[:-64])
    refusal(load_transformer, path)


@pytest.mark.parametrize(("name", "key", "said"), [
    (QKV, "prism.hadamard.version", r"rotated ones.*key prism\.hadamard\.version"),
    (QKV, "prism.rotation", r"key prism\.rotation"),
    (QKV, "quantize.hadamard_block", r"key quantize\.hadamard_block"),
    ("blk.0.attn_q.weight", "general.name", r"CLIPLoader \(GGUF\) of city96/ComfyUI-GGUF, type flux2"),
    ("token_embd.weight", "general.name", r"CLIPLoader \(GGUF\)"),
])
def test_what_other_programs_read(name, key, said, tmp_path):
    """Rotated weights would draw noise; a text encoder has a loader of its own."""
    contents = file(tensor(name, kind=142), metadata=text(key) + struct.pack("<II", 4, 1), keys=1)
    (tmp_path / "model.gguf").write_bytes(contents)
    assert re.search(said, refusal(load_transformer, tmp_path / "model.gguf"))


@pytest.mark.parametrize("small_model", [1, 2], ids=["Q1_0", "Q2_0"], indirect=True)
def test_ggml_reads_it(small_model, tmp_path):
    """ggml finds every tensor and dequantizes it to the values of the published weights."""
    save_transformer(small_model.loaded, tmp_path / "model.gguf", "gguf")
    read = Ggml.find_or_skip().read(tmp_path / "model.gguf")
    assert read.keys() == {stored(name) for name in small_model.dense}
    for name, tensor in small_model.dense.items():
        assert np.array_equal(read[stored(name)], tensor.flatten().numpy()), name


def test_package_reads_it(models, tmp_path):
    save_transformer(models[1].loaded, tmp_path / "model.gguf", "gguf")
    reader = package.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "flux"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(types) == len(models[1].dense) and types[QKV] == "Q1_0" and types["img_in.weight"] == "BF16"
    assert reader.tensors[0].shape.tolist() == list(models[1].dense["img_in.weight"].shape[::-1])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_package_wrote_it(models, prefix, tmp_path, caplog):
    dense = models[1].dense
    model = load_transformer(community_file(tmp_path / "model.gguf", dense, prefix))
    assert model.variant == "binary" and unwrap(model.tensors[QKV]).scale.dtype == torch.bfloat16
    assert "Q8_0" in caplog.text and "not the published BF16" in caplog.text
    for name, tensor in dense.items():
        expected = tensor
        if "modulation" in name:
            kind = package.GGMLQuantizationType.Q8_0
            expected = torch.from_numpy(package.quants.dequantize(package.quants.quantize(tensor.numpy(), kind), kind))
            assert model.tensors[name].dtype == torch.float32
        assert torch.equal(values(model.tensors[name]), expected), name


def test_diffusers_names(models, tmp_path):
    """A GGUF under diffusers' names, whose final modulation has its halves the other way round."""
    model = models[2].loaded
    tensors = to_diffusers(model.tensors)
    blocks = {}
    for name, weight in ((name, unwrap(tensor)) for name, tensor in tensors.items() if is_packed(tensor)):
        scale = weight.scale.half().repeat_interleave(2, dim=1)[..., None].view(torch.uint8)
        blocks[name] = torch.cat((scale, weight.codes.view(weight.n, -1, 16)), dim=-1)
    entries = gguf.layout({name: (gguf.Q2_0 if name in blocks else gguf.BF16, tuple(tensor.shape))
                           for name, tensor in tensors.items()})
    gguf.write(tmp_path / "model.gguf", entries, (blocks.get(name, tensor) for name, tensor in tensors.items()), {})
    read = to_comfyui(load_transformer(tmp_path / "model.gguf").tensors)
    for name, tensor in models[2].dense.items():
        assert torch.equal(values(read[name]), tensor), name


def test_scales_stay_exact(models, tmp_path):
    """FP16 scales that are no BF16 numbers stay FP16, throughout the file; unequal pairs of Q2_0 stay groups of 64."""
    path = tmp_path / "model.gguf"
    save_transformer(models[2].loaded, path, "gguf")
    contents = gguf.read_header(path)
    start = contents.start + contents.entries[QKV].offset
    data = bytearray(path.read_bytes())
    data[start : start + 2] = struct.pack("<e", 0.1)
    path.write_bytes(data)
    tensors = load_transformer(path).tensors
    assert {unwrap(tensor).scale.dtype for tensor in tensors.values() if is_packed(tensor)} == {torch.float16}
    params = unwrap(tensors[QKV])
    assert params.group == 64 and params.scale[0, 0] == torch.tensor(0.1, dtype=torch.float16)
    save_transformer(load_transformer(path), tmp_path / "again.gguf", "gguf")
    assert gguf.read(tmp_path / "again.gguf")[0][QKV].equal(gguf.read(path)[0][QKV])


def test_unpacked_gguf(models, tmp_path):
    """BF16 throughout: packed on loading like any unpacked file."""
    entries = gguf.layout({name: (gguf.BF16, tuple(tensor.shape)) for name, tensor in models[1].dense.items()})
    gguf.write(tmp_path / "model.gguf", entries, (tensor.bfloat16() for tensor in models[1].dense.values()), {})
    model = load_transformer(tmp_path / "model.gguf")
    assert model.variant == "binary" and torch.equal(values(model.tensors[QKV]), models[1].dense[QKV])


def test_command_line(models, tmp_path, capsys):
    save_transformer(models[1].loaded, tmp_path / "model.safetensors", "comfy")
    assert main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 0
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 0
    assert "gguf format, binary" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "model"), "--to", "gguf"]) == 2
    assert ".gguf" in capsys.readouterr().err


def test_not_writable_exactly(models, tmp_path):
    """A scale outside FP16 is refused, not rounded."""
    model = models[1].loaded
    scale = next(unwrap(tensor) for tensor in model.tensors.values() if is_packed(tensor)).scale
    before = scale[0, 0].clone()
    scale[0, 0] = 2.0**-30
    try:
        assert "FP16" in refusal(lambda path: save_transformer(model, tmp_path / "model.gguf", "gguf"), model.path)
    finally:
        scale[0, 0] = before
    assert not list(tmp_path.iterdir())


# Damaged and hostile files.

def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = QKV, shape: tuple[int, ...] = (128, 8), kind: int = 41, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*tensors: bytes, metadata: bytes = b"", keys: int = 0, count: int | None = None, version: int = 3,
         magic: bytes = b"GGUF", data: int = 1 << 16) -> bytes:
    return magic + struct.pack("<IQQ", version, len(tensors) if count is None else count, keys) + metadata + \
        b"".join(tensors) + bytes(data)


def array(kind: int, length: int, data: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, length) + data


HOSTILE = {
    "empty": b"",
    "magic": file(tensor(), magic=b"GGML"),
    "version-1": file(tensor(), version=1),
    "big-endian": file(tensor(), version=3 << 24),
    "more-tensors-than-bytes": file(tensor(), count=1 << 62),
    "more-keys-than-bytes": file(tensor(), keys=1 << 62),
    "endless-name": file(struct.pack("<Q", 1 << 62)),
    "endless-array": file(metadata=array(0, 1 << 62), keys=1),
    "endless-strings": file(metadata=array(8, 1 << 62), keys=1),
    "array-of-arrays": file(metadata=array(9, 1), keys=1),
    "unknown-metadata": file(metadata=text("a") + struct.pack("<I", 99), keys=1),
    "name-not-text": file(struct.pack("<Q", 2) + b"\xff\xfe"),
    "alignment-0": file(tensor(), metadata=text("general.alignment") + struct.pack("<II", 4, 0), keys=1),
    "alignment-24": file(tensor(), metadata=text("general.alignment") + struct.pack("<II", 4, 24), keys=1),
    "alignment-text": file(tensor(), metadata=text("general.alignment") + struct.pack("<I", 8) + text("32"), keys=1),
    "alignment-huge": file(tensor(), metadata=text("general.alignment") + struct.pack("<II", 4, 1 << 31), keys=1),
    "no-dimensions": file(tensor(shape=())),
    "five-dimensions": file(tensor(shape=(128, 1, 1, 1, 1))),
    "billions-of-dimensions": file(text(QKV) + struct.pack("<I", 1 << 31)),
    "zero-dimension": file(tensor(shape=(128, 0))),
    "huge-dimensions": file(tensor(shape=(1 << 62, 1 << 62, 1 << 62, 1 << 62))),
    "overflowing-dimensions": file(tensor(shape=(1 << 33, 1 << 33))),
    "half-a-block": file(tensor(shape=(64, 8))),
    "offset-beyond": file(tensor(offset=1 << 40)),
    "offset-wraps": file(tensor(offset=(1 << 64) - 32)),
    "offset-unaligned": file(tensor(offset=8)),
    "overlap": file(tensor(), tensor("img_in.weight", (128, 8), 1, 32)),
    "same-place": file(tensor(), tensor("img_in.weight")),
    "same-name": file(tensor(), tensor(offset=1 << 12)),
    "type-removed": file(tensor(kind=4)),
    "type-unknown": file(tensor(kind=1 << 31)),
    "truncated-data": file(tensor(shape=(3072, 3072)), data=100),
    "truncated-header": file(tensor(), data=0)[:-5],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        refusal(gguf.read, path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("contents", [file(), file(tensor("blk.0.attn_q.weight")), file(tensor(shape=(128, 2, 2)))],
                         ids=["nothing", "language-model", "three-dimensions"])
def test_not_klein(contents, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    refusal(load_transformer, path)


def test_cut_anywhere(models, tmp_path):
    """A download that stopped, at any byte of the header and at some of the data."""
    path = tmp_path / "model.gguf"
    save_transformer(models[1].loaded, path, "gguf")
    data, start = path.read_bytes(), gguf.read_header(path).start
    for size in [*range(0, start, 97), start, start + 1, len(data) // 2, len(data) - 64]:
        path.write_bytes(data[:size])
        refusal(load_transformer, path)


@pytest.mark.parametrize(("kind", "known_as"), [(10, "Q2_K"), (2, "Q4_0"), (34, "TQ1_0"), (35, "TQ2_0"),
                                                  (99, "type 99")])
def test_rounded_types(kind, known_as, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(file(tensor(shape=(256, 8), kind=kind)))
    sentence = refusal(load_transformer, path).replace(str(path), "")
    assert known_as in sentence and "download" in sentence
    assert ("256 weights" in sentence) == known_as.startswith("TQ")


def test_rounded_block_layer(models, tmp_path):
    """Q8_0 in a layer that Bonsai packs: an ordinary FLUX.2 Klein, or Bonsai rounded."""
    entries = gguf.layout({name: (gguf.Q8_0 if name == QKV else gguf.BF16, tuple(tensor.shape))
                           for name, tensor in models[1].dense.items()})
    data = (torch.ones(entry.size, dtype=torch.uint8) for entry in entries.values())
    gguf.write(tmp_path / "model.gguf", entries, data, {})
    assert "Q8_0" in refusal(load_transformer, tmp_path / "model.gguf")
