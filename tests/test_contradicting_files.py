"""Model files that contradict themselves end in ModelFileError: JSON, tags and numbers against tensors, and tensors
among themselves."""

import json
from pathlib import Path

import pytest
import torch

from bonsai_image.loaders import load_text_encoder, load_transformer, load_vae
from bonsai_image.ops.packed import equal, is_packed
from bonsai_image.tests.support.sound_files import FILES, QKV, TO_Q, UP, WEIGHTS, load, read, refusal, write

INDEX, QUANTIZATION = f"{WEIGHTS}.index.json", "quantization_config.json"
DEEP: list = []
for _ in range(700):
    DEEP = [DEEP]


def cases(table: dict):
    """Parametrise over the values of ``table``, with its keys for ids."""
    return pytest.mark.parametrize("case", table.values(), ids=[str(key) for key in table])


# JSON beside the weights.

def statements(table: dict) -> dict:
    """(model, file) -> key -> values, flattened and named."""
    return {f"{name}-{key}-{i}": (name, file, key, value) for (name, file), keys in table.items()
            for key, values in keys.items() for i, value in enumerate(values)}


def state(path: Path, file: str, key: str, value) -> None:
    (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), key: value}))


NO_JSON = {"empty": b"", "cut": b"{", "list": b"[]", "null": b"null", "string": b'"bits"', "deep": b"[" * 100_000,
           "not-utf8": b"\xff\xfe", "long-number": b"9" * 5000}
#: What no tensor shows.
OTHER_MODELS = {
    ("mlx", "config.json"): {"rope_theta": [10_000, "2001"], "eps": [1e-5], "axes_dims_rope": [[16, 56, 56]]},
    ("te-mlx", "config.json"): {"rope_theta": [10_000.0], "rms_norm_eps": [1e-5]},
    ("sharded", INDEX): {"weight_map": [None, {}, [], "a", {"x_embedder.weight": "c.safetensors"}]},
}


@cases(statements(OTHER_MODELS) | {f"{name}-{file}-{kind}": (name, file, None, text) for name, file in [
    ("mlx", "config.json"), ("mlx", QUANTIZATION), ("gemlite", QUANTIZATION), ("te-mlx", "config.json"),
    ("te-dense", "config.json"), ("vae", "config.json"), ("sharded", INDEX)] for kind, text in NO_JSON.items()})
def test_json_that_is_damaged_or_of_another_model(case, copy):
    name, file, key, value = case
    path = copy(name)
    if key is None:
        (path / file).write_bytes(value)
    else:
        state(path, file, key, value)
    refusal(FILES[name][0], path)


CONTRADICTIONS = {
    ("mlx", QUANTIZATION): {"bits": [1, 3, "1.58", 2.5, [2], -2, DEEP], "group_size": [64, 256, 0, -128, 10**400, True,
                                                                                     DEEP]},
    ("gemlite", QUANTIZATION): {"bits": [1, DEEP], "group_size": [64, 0]},
    ("mlx", "config.json"): {
        "num_layers": [2, DEEP, "1\n. Another line. " * 99], "num_single_layers": [20], "num_attention_heads": [24],
        "joint_attention_dim": [7680], "in_channels": [128], "mlp_ratio": [4.0], "attention_head_dim": [64],
        "quantization": [{"bits": 4, "group_size": 64}]},
    ("te-mlx", "config.json"): {
        "num_hidden_layers": [36], "hidden_size": [2560], "vocab_size": [151_936], "head_dim": [128],
        "quantization": [{"bits": 8, "group_size": 64}, {"bits": 4, "group_size": 32}]},
    ("vae", "config.json"): {"latent_channels": [16], "block_out_channels": [[128, 256]], "layers_per_block": [2]},
}


@cases(statements(CONTRADICTIONS))
def test_tensors_are_right_where_json_contradicts_them(case, copy, root, caplog):
    name, file, key, value = case
    path = copy(name)
    state(path, file, key, value)
    loaded, original = FILES[name][0](path), load(name, root / name)
    keys = value if isinstance(value, dict) else (key,)
    assert loaded.warnings and any(f"{key} is " in warning for warning in loaded.warnings for key in keys)
    assert all(len(warning) < 300 and warning.isprintable() for warning in loaded.warnings)
    assert loaded.warnings[0] in caplog.text
    assert loaded.tensors.keys() == original.keys()
    assert all(equal(tensor, original[key]) if is_packed(tensor) else torch.equal(tensor, original[key])
               for key, tensor in loaded.tensors.items())
    if name == "vae":
        assert loaded.config == FILES[name][0](root / name).config


@pytest.mark.parametrize("name", ["mlx", "gemlite"])
@pytest.mark.parametrize(("bits", "group"), [("2", "128"), (2.0, 128.0), ("2.0", 128)])
def test_whole_numbers_in_any_spelling(name, bits, group, copy):
    path = copy(name)
    (path / QUANTIZATION).write_text(json.dumps({"bits": bits, "group_size": group}))
    assert FILES[name][0](path).warnings == []


def test_an_index_that_names_other_tensors(copy):
    path = copy("sharded")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["gone.weight"] = "a.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    assert load_transformer(path).warnings == ["the index and a.safetensors differ in 1 tensors, such as gone.weight"]


@pytest.mark.parametrize("shard", ["c.safetensors", "../mlx/" + WEIGHTS, "/etc/passwd", "..", ".", "",
                                   "config.json", "x.pt", "a" * 5000 + ".safetensors", "a\0.safetensors", 7, None, []])
def test_index_names_another_shard(shard, copy):
    copy("mlx")
    path = copy("sharded")
    (path / "x.pt").write_bytes(b"")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["x_embedder.weight"] = shard
    (path / INDEX).write_text(json.dumps(index))
    message = refusal(load_transformer, path)
    assert "root:" not in message


# Tensors beside each other.

def _edit(path: Path, name: str, change) -> None:
    file = path / FILES[name][1]
    tensors = read(file)
    change(tensors)
    write(file, tensors)


def _renamed(old: str, new: str):
    return lambda t: t.update({new: t.pop(old)})


def _added(name: str, shape: tuple[int, ...] = (4, 4), value: float = 1.0):
    return lambda t: t.update({name: torch.full(shape, value, dtype=torch.bfloat16)})


def _to_four_bits(t):
    t.update({f"{TO_Q}.weight": torch.cat([t[f"{TO_Q}.weight"]] * 2, 1)})


def _set(name: str, index: int, value: float):
    return lambda t: t[name].view(-1).__setitem__(index, value)


def _replaced(name: str, change):
    return lambda t: t.update({name: change(t[name])})


def _last(value: float):
    return lambda t: torch.cat((t.flatten()[:-1], torch.tensor([value]).to(t.dtype))).view(t.shape)


def _dense(t):
    del t[f"{TO_Q}.scales"], t[f"{TO_Q}.biases"]
    t[f"{TO_Q}.weight"] = torch.ones(128, 128, dtype=torch.bfloat16)


def _pack_embedder(t):
    t["context_embedder.weight"] = torch.zeros(128, 24, dtype=torch.uint8).view(torch.uint32)
    t["context_embedder.scales"], t["context_embedder.biases"] = torch.ones(2, 128, 3, dtype=torch.bfloat16).clone()


DAMAGE = {
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat((t, t[:1])),
    "transposed": lambda t: t.flatten()[None] if t.shape[0] > 1 else t.flatten()[:, None],
    "extra dimension": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "float64": lambda t: t.double(),
    "nan": _last(float("nan")),
    "infinity": _last(float("inf")),
}
DAMAGED = {f"{name}-{role}-{damage}": (name, _replaced(FILES[name][column], change)) for name in FILES
           for column, role in enumerate(("dense", "codes", "scale", "shift"), 2) for damage, change in DAMAGE.items()
           if FILES[name][column] and not (role == "codes" and damage in ("nan", "infinity"))
           and not (damage == "complex" and name == "base3")
           # It takes ten times as long as the others, which have all damage of the two.
           and not (name == "te-hqq" and role in ("dense", "shift") and damage not in ("short", "float64", "nan"))}
DAMAGED |= {f"{name}-{target}-missing": (name, lambda t, target=target: t.pop(target))
            for name, (_, _, *targets) in FILES.items() for target in targets if target}

MIXTURES = {
    **{f"{name}-{kind}": (name, change) for name in FILES for kind, change in {
        "extra": _added("extra|weight" if name == "te-hqq" else "extra.weight"),
        "name-of-two-lines": _added("a\x00\nb. C|weight" if name == "te-hqq" else "a\x00\nb. C.weight"),
        "long-name": _added("n" * 20_000 + ("|weight" if name == "te-hqq" else ".weight")),
        "renamed": _renamed(FILES[name][2], "renamed" + ("|weight" if name == "te-hqq" else ".weight"))}.items()},
    "mlx-orphan-scales": ("mlx", _added("x_embedder.scales")), "mlx-orphan-biases": ("mlx", _added("y.biases")),
    "mlx-linear-bias": ("mlx", _added(f"{TO_Q}.bias", (128,))), "mlx-q-of-4-bits": ("mlx", _to_four_bits),
    "mlx-q-dense": ("mlx", _dense), "mlx-packed-embedder": ("mlx", _pack_embedder),
    "gemlite-orphan-scales": ("gemlite", _added("x_embedder.scales")),
    "gemlite-linear-bias": ("gemlite", _added(f"{TO_Q}.bias", (128,))),
    "gemlite-not-a-tensor": ("gemlite", lambda t: t.update(extra="text")),
    "gemlite-float-metadata": ("gemlite", lambda t: t.update({f"{TO_Q}.metadata": t[f"{TO_Q}.metadata"].float()})),
    "gemlite-short-metadata": ("gemlite", lambda t: t.update({f"{TO_Q}.metadata": t[f"{TO_Q}.metadata"][:11]})),
    "comfy-no-tag": ("comfy", lambda t: t.pop(f"{QKV}.comfy_quant")),
    "comfy-orphan-scale": ("comfy", _added("img_in.weight_scale")),
    "comfy-shift-of-symmetric": ("comfy", _added(f"{QKV}.weight_shift", (384, 1))),
    "comfy-tag-alone": ("comfy", lambda t: t.update({"x.comfy_quant": t[f"{QKV}.comfy_quant"].clone()})),
    # A row of 128 codes fills 25 bytes and 3 of the 5 digits of the 26th.
    "base3-byte-above-242": ("base3", _set(f"{QKV}.weight", 0, 243)), "base3-byte-255": ("base3", _set(
        f"{QKV}.weight", 30, 255)), "base3-padding": ("base3", _set(f"{QKV}.weight", 25, 27)),
    "base3-too-wide": ("base3", lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].repeat(1, 2)[:, :27]})),
    "base3-too-narrow": ("base3", lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"][:, :25]})),
    "single-twice-by-prefix": ("single", lambda t: t.update(
        {f"model.diffusion_model.{name}": t[name].clone() for name in list(t)})),
    "single-norm-twice": ("single", _added("single_blocks.0.norm.query_norm.scale", (128,))),
    "single-not-bonsai": ("single", _set("single_blocks.0.linear2.weight", 0, 7)),
    "te-mlx-norm-twice": ("te-mlx", _added("norm.weight", (128,))),
    "te-hqq-bias": ("te-hqq", _added(f"{UP}|bias", (128,))),
    "te-dense-bias": ("te-dense", _added(f"{UP}.bias", (128,))),
    "te-dense-too-few-layers": ("te-dense", lambda t: [t.pop(name) for name in list(t) if ".26." in name]),
    "vae-too-few-blocks": ("vae", lambda t: [t.pop(name) for name in list(t) if ".down_blocks.1." in name]),
    "vae-no-batch-norm": ("vae", lambda t: t.pop("bn.running_var")),
    "vae-counter-of-two": ("vae", lambda t: t.update({"bn.num_batches_tracked": torch.zeros(2)})),
}


@cases({"bf16": torch.tensor(3.0, dtype=torch.bfloat16), "one-element": torch.tensor([7]), "missing": None})
def test_the_batch_counter_of_a_vae_says_nothing(case, copy, root):
    path = copy("vae")
    _edit(path, "vae", lambda t: t.pop("bn.num_batches_tracked") if case is None else t.update(
        {"bn.num_batches_tracked": case}))
    tensors = load_vae(path).tensors
    assert tensors.keys() == load_vae(root / "vae").tensors.keys()
    assert tensors["bn.num_batches_tracked"].dtype == torch.int64 and tensors["bn.num_batches_tracked"].shape == ()


NUMBERS = {f"{part}-{i}={value}": ("gemlite", _set(f"{TO_Q}.{part}", i, value)) for part, indices, values in [
    ("metadata", range(12), (-1, 77, 2**31 - 1)), ("orig_shape", range(2), (0, -128, 256, 2**31 - 1)),
    ("metadata", (1,), (1, 4)), ("metadata", (2,), (64,)), ("metadata", (10,), (2,))]
           for i in indices for value in values}


def _laughs() -> list:
    bomb: list = ["ha"]
    for _ in range(64):
        bomb = [bomb, bomb]
    return bomb


HQQ_FIELDS = {
    "nbits": [8, 4.0, "4", None, torch.tensor(4), torch.ones(9), _laughs()], "axis": [0, True], "packing": ["4bit", 4],
    "group_size": [128, 63, 0, -64, "64", True, 10**30], "quant_zero": [True, 1, "yes"], "view_as_float": [True],
    "shape": [None, (128,), (-128, -128), (128.0, 128.0), "ab", (0, 128), (128, 10**30), [_laughs(), 1], (127, 128)],
    "meta": [{"nbits": 8}, {"W_q": 5}], "W_q": [None, "text"], "scale": [None, 1.0], "zero": [8, []]}


@pytest.fixture(scope="module")
def hqq_layers(root) -> dict:
    stored = torch.load(root / "te-hqq" / "qmodel.pt", weights_only=True)
    return {name: stored[name] for name in (UP, "model.layers.0.self_attn.q_norm")}


@cases({f"{key}-{i}": {key: value} for key, values in HQQ_FIELDS.items() for i, value in enumerate(values)} | {"": {}})
def test_hqq_fields(case, hqq_layers, tmp_path):
    """The layer is named; where nothing is wrong with it, the others that are missing."""
    torch.save(hqq_layers | {UP: hqq_layers[UP] | case}, tmp_path / "qmodel.pt")
    assert (UP in refusal(load_text_encoder, tmp_path)) == bool(case)


TAG = {"format": "bonsai_packed", "bits": 2, "group_size": 128, "form": "symmetric"}
TAGS = {
    **{f"text-{i}": text for i, text in enumerate((b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b"7"))},
    **{f"{key}={str(value)[:12]}": json.dumps({**TAG, key: value}).encode() for key, values in {
        "format": ["int8", None, [], "f\n. G" * 999], "bits": [1, 4, 0, 3, 8, -2, "2", 2.0, True, [2], 10**30, DEEP],
        "group_size": [64, 0, -128, "128", 128.0, True, 10**400, None, DEEP],
        "form": [None, "affine", "weird", ["symmetric"], DEEP], "storage": ["base4", "base3", 3, True]}.items()
       for value in values},
    "int64": torch.tensor(list(json.dumps(TAG).encode())), "a-number": torch.tensor(10**15),
    "float": torch.tensor([123.0, 125.0]), "matrix": torch.tensor([[123, 125]], dtype=torch.uint8),
}
TAGS = {f"tag-{kind}": ("comfy", lambda t, case=case: t.update({f"{QKV}.comfy_quant": torch.tensor(
    list(case), dtype=torch.uint8) if isinstance(case, bytes) else case})) for kind, case in TAGS.items()}


@cases(DAMAGED | MIXTURES | NUMBERS | TAGS)
def test_wrong_tensors(case, copy):
    name, change = case
    path = copy(name)
    _edit(path, name, change)
    refusal(FILES[name][0], path)
