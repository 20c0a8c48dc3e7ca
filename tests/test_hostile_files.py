"""Files of other models, pickles that would run code, and paths of the wrong kind end in ModelFileError. Nothing in
them runs, and a refusal leaves nothing behind.
"""

import gc
import os
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from bonsai_image.loaders import ModelFileError, find_repository, load_text_encoder, load_transformer, load_vae
from bonsai_image.loaders.klein import comfyui_shapes, diffusers_shapes
from bonsai_image.tests.support.sound_files import FILES, KLEIN, TO_Q, WEIGHTS, load, read, refusal, write

LOADERS = {"transformer": load_transformer, "text-encoder": load_text_encoder, "vae": load_vae}


def refused_by_all(path: Path, *more) -> None:
    for loader in (*LOADERS.values(), *more):
        refusal(loader, path)


# Models of other families: a few of the tensors that set each apart.

FAMILIES = {
    "sd15": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight",
             "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"],
    "sdxl-unet": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"],
    "sd3": ["x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"],
    "flux1": ["img_in.weight", "txt_in.weight", "double_blocks.0.img_mod.lin.weight", "guidance_in.in_layer.weight",
              "double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"],
    "flux1-diffusers": ["x_embedder.weight", "context_embedder.weight", "transformer_blocks.0.norm1.linear.weight",
                        "single_transformer_blocks.0.attn.to_q.weight", "proj_out.weight"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"],
    "clip": ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "llama": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight",
              "model.layers.0.mlp.gate_proj.weight"],
    "gemma3": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight",
               "model.layers.0.pre_feedforward_layernorm.weight"],
    "sd-vae": ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "lora": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.alpha"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shapes", [comfyui_shapes(KLEIN), diffusers_shapes(KLEIN)], ids=["comfyui", "diffusers"])
def test_ordinary_klein(shapes, dtype, tmp_path):
    path = tmp_path / "flux-2-klein-4b.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, path)
    refusal(load_transformer, path)


@pytest.mark.parametrize(("name", "loader"), [(name, kind) for name in FILES for kind, loader in LOADERS.items()
                                              if loader is not FILES[name][0]])
def test_model_of_another_kind(name, loader, root):
    refusal(LOADERS[loader], root / name)


# Pickles.

class Call:
    """Unpickles to the result of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _payload(sentinel: Path) -> dict[str, object]:
    touch = f"open({str(sentinel)!r}, 'w').close()"
    calls = {"os-system": Call(os.system, f"touch '{sentinel}'"), "eval": Call(eval, touch), "exec": Call(exec, touch),
             "open": Call(open, str(sentinel), "w"), "mkdir": Call(os.mkdir, str(sentinel)),
             "unpickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch '{sentinel}'")))}
    tensor = torch.ones(4, 4)
    return {
        **calls,
        **{f"{name}-in-a-layer": {f"{TO_Q}.W_q": call, "double_stream_modulation_img.linear.weight": tensor}
           for name, call in calls.items()},
        **{f"{name}-in-an-entry": {"model.layers.0.self_attn.q_norm": {"weight": tensor, "W_q": call}}
           for name, call in calls.items()},
        **{f"{name}-as-a-key": {(call,): tensor} for name, call in calls.items() if name != "open"},
    }


@pytest.fixture
def sentinel(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.mark.parametrize("storage", ["zip", "legacy", "raw"])
@pytest.mark.parametrize("kind", _payload(Path("x")))
def test_pickle_that_would_run_code(kind, storage, sentinel, tmp_path):
    payload, path = _payload(sentinel)[kind], tmp_path / "transformer" / "state_dict.pt"
    path.parent.mkdir()
    if storage == "raw":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=storage == "zip")
    refused_by_all(path)
    refusal(find_repository, tmp_path)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["os-system", "eval", "exec", "open", "mkdir", "unpickle"])
def test_the_payloads_are_live(kind, sentinel):
    """Without the restricted unpickler each of them does run."""
    pickle.loads(pickle.dumps(_payload(sentinel)[kind]))  # noqa: S301 - our own bytes: the control of the test above
    assert sentinel.exists()


KEY = "double_stream_modulation_img.linear.weight"
OBJECTS = {
    "module": lambda: torch.nn.Linear(2, 2), "tensor": lambda: torch.ones(2), "list": lambda: [torch.ones(2)],
    "none": lambda: None, "number": lambda: 7, "empty": dict, "integer-keys": lambda: {1: torch.ones(2)},
    "string": lambda: {KEY: "text"}, "nested": lambda: {KEY: {KEY: {KEY: torch.ones(2)}}},
    "sparse": lambda: {KEY: torch.eye(4).to_sparse()},
    "quantized": lambda: {KEY: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)},
    "meta": lambda: {KEY: torch.empty(4, 4, device="meta")},
    "memory-bomb": lambda: {KEY: torch.ones(1).expand(10**6, 10**6)},
    "memory-bomb-in-hqq": lambda: {"model.layers.0.self_attn.q_norm": {"weight": torch.ones(1).expand(10**6, 10**6)},
                                   "x": {"W_q": torch.ones(1).expand(10**6, 10**6)}},
}


@pytest.mark.parametrize("name", ["gemlite", "te-hqq"])
@pytest.mark.parametrize("kind", ["legacy", "compressed", "torchscript", "plain-zip", "no-table", "pickle-suffix"])
def test_other_container(kind, name, copy):
    path = copy(name)
    file = path / FILES[name][1]
    with zipfile.ZipFile(file) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    if kind == "legacy":
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    elif kind == "pickle-suffix":
        save_file({"x": torch.ones(2)}, file)
    else:
        method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", method) as archive:
            for record, data in records.items():
                if kind == "compressed" or (kind == "no-table" and not record.endswith("data.pkl")):
                    archive.writestr(record, data)
    refusal(FILES[name][0], path)


# Paths.

PATHS = {
    "nonexistent": lambda p: None, "empty-file": lambda p: p.write_bytes(b""), "empty-folder": Path.mkdir,
    "text": lambda p: p.write_text("hello"), "zeros": lambda p: p.write_bytes(bytes(64)),
    "dangling-link": lambda p: p.symlink_to(p.with_name("gone")), "link-to-itself": lambda p: p.symlink_to(p),
    "folder-in-folder": lambda p: (p / WEIGHTS).mkdir(parents=True),
    "two-files": lambda p: [p.mkdir(), save_file({"x": torch.ones(2)}, p / "a.safetensors"),
                            save_file({"x": torch.ones(2)}, p / "b.safetensors")],
    "only-json": lambda p: [p.mkdir(), (p / "config.json").write_text("{}")],
}


NO_MODELS = {(kind, suffix): make for kind, make in PATHS.items() for suffix in (".safetensors", ".pt", "")}
NO_MODELS |= {(kind, ".pt"): lambda p, make=make: torch.save(make(), p) for kind, make in OBJECTS.items()}
NO_MODELS |= {(family, ".safetensors"): lambda p, names=names: save_file(
    {name: torch.zeros(8, 8) for name in names}, p) for family, names in FAMILIES.items()}


@pytest.mark.parametrize(("kind", "suffix"), NO_MODELS)
def test_what_is_no_model(kind, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    NO_MODELS[kind, suffix](path)
    refused_by_all(path, *[find_repository] * (kind not in OBJECTS))  # which looks at names alone


@pytest.mark.parametrize("name", ["n" * 5000, "a/b/../../c"])
def test_path_no_system_holds(name):
    refused_by_all(Path(name), find_repository)


REPOSITORIES = {
    "text-encoder-only": lambda p: (p / "transformer").rename(p / "vae"),
    "model-index-of-another": lambda p: (p / "model_index.json").write_text('{"_class_name": "A\\n. B"}'),
    "model-index-damaged": lambda p: (p / "model_index.json").write_text("{"),
    "two-files-in-a-part": lambda p: shutil.copy(p / "text_encoder" / "model.safetensors", p / "text_encoder" / "b.pt"),
    "damaged-part": lambda p: os.truncate(p / "text_encoder" / "model.safetensors", 99),
    "hostile-part": lambda p: [(p / "vae").mkdir(),
                               torch.save(Call(os.mkdir, str(p / "executed")), p / "vae" / "vae.pt")],
}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_repository(kind, root, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copytree(root / "te-dense", tmp_path / "text_encoder")
    REPOSITORIES[kind](tmp_path)
    refusal(find_repository, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_vae_of_many_blocks_and_many_resnets(root, tmp_path):
    """What is expected of it does not grow with the product of the two."""
    tensors = read(root / "vae" / WEIGHTS)
    for i in range(400):
        tensors.setdefault(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", torch.ones(1))
        tensors.setdefault(f"encoder.down_blocks.0.resnets.{i}.conv1.weight", torch.ones(1))
    save_file(tensors, tmp_path / WEIGHTS)
    tracemalloc.start()
    refusal(load_vae, tmp_path / WEIGHTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


# What a refusal leaves behind.

@pytest.mark.parametrize("name", ["mlx", "gemlite", "comfy", "base3", "unpacked", "te-hqq", "vae"])
def test_nothing_is_held_after_a_refusal(name, copy, root):
    """The file is not mapped any more, can be replaced, and then loads."""
    path = copy(name)
    file = path / FILES[name][1]
    tensors = read(file)
    tensors[FILES[name][2]] = tensors[FILES[name][2]] * float("nan")
    write(file, tensors)
    refusal(FILES[name][0], path)
    gc.collect()
    assert str(file) not in {entry.path for entry in psutil.Process().memory_maps()}
    os.replace(shutil.copy(root / name / FILES[name][1], path / "new"), file)
    load(name, path)


@pytest.mark.parametrize("name", ["mlx", "gemlite", "base3"])
def test_refusals_do_not_grow_memory(name, copy):
    path = copy(name)
    file = path / FILES[name][1]
    tensors = read(file)
    tensors[FILES[name][4]] = tensors[FILES[name][4]] * float("nan")
    # Beside what is wrong, 8 MB: fifty files kept would be 400 MB.
    tensors["large"] = torch.zeros(2_000_000)
    write(file, tensors)
    process = psutil.Process()

    def refuse():
        with pytest.raises(ModelFileError):
            FILES[name][0](path)

    for _ in range(3):
        refuse()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(50):
        refuse()
    gc.collect()
    assert process.memory_info().rss - before < 64e6
