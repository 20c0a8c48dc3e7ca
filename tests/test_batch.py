"""``bonsai-image batch`` without Ray: what an image follows from, resuming, failures, the manifest, the page."""

import errno
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bonsai_image import disk
from bonsai_image.loaders import ModelFileError
from bonsai_image.standalone.batch import manifest, rows, stages
from bonsai_image.standalone.cli import main
from bonsai_image.tests.support.batch_runs import COMMON, MINIATURE, batch, images, write_table

PROMPTS = ("three red circles on a white background", "a large yellow ring on a grey background", "ein Bäumchen")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory) -> Path:
    """An undisturbed run: three prompts with two seeds each."""
    out = tmp_path_factory.mktemp("whole")
    assert batch(prompts, out, "--seeds", 2) == 0
    return out


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_table_says_the_same(suffix, tmp_path):
    records = [{"prompt": "a, b", "seed": 5, "width": 128, "id": "x"},
               {"prompt": "c", "seed": 6, "width": 256, "id": "y"}]
    defaults = rows.Row("", height=512, steps=3)
    assert list(rows.read(write_table(tmp_path / f"a{suffix}", records), defaults)) == [
        rows.Row("a, b", 5, 128, 512, 3, id="x"), rows.Row("c", 6, 256, 512, 3, id="y")]


@pytest.mark.parametrize("record, words", [
    ({"width": 100}, "multiples of 16"), ({"steps": 0}, "steps must be at least 1"), ({"seed": -1}, "between 0"),
    ({"seed": 1.5}, "seed cannot be 1.5"), ({"width": "wide"}, "width cannot be 'wide'"), ({"prompt": " "}, "empty"),
    ({"prompt": ""}, "empty"), ({"id": "\ud800"}, "id cannot be"),
    ({"lora": "nothing.safetensors"}, "does not exist"), ({"reference": "a.jsonl"}, "cannot identify image")], ids=str)
def test_a_row_that_cannot_be_used_is_named_and_the_others_are_read(record, words, tmp_path):
    path = write_table(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"} | record, {"prompt": "c"}])
    first, error, last = rows.read(path, rows.Row(""))
    assert (first.prompt, last.prompt) == ("a", "c")
    assert str(error).startswith("row 2 of a.jsonl: ") and words in str(error)


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", '{"promt": "x"}', "column promt"), ("a.jsonl", "{", "a readable prompt file"),
    ("a.parquet", "no table", "a readable prompt file"), ("a.yaml", "", ".yaml")], ids=str)
def test_a_file_that_is_no_table_is_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError, match=words):
        list(rows.read(tmp_path / name, rows.Row("")))


def test_a_row_without_a_prompt_fails_and_the_others_are_made(tmp_path, capsys):
    path = write_table(tmp_path / "a.csv", [{"prompt": "", "seed": 1}, {"prompt": "a", "seed": 1}])
    assert batch(path, tmp_path / "out") == 1
    assert "row 2 of a.csv: the prompt is empty" in capsys.readouterr().err and len(images(tmp_path / "out")) == 1


def test_a_name_follows_from_everything_that_makes_an_image_and_from_nothing_else(tmp_path):
    for name in ("a", "b", "moved"):
        (tmp_path / name).write_text("x" if name != "b" else "y")
    row = rows.Row("a", lora=str(tmp_path / "a"))
    changes = [{"prompt": "b"}, {"seed": 1}, {"width": 512}, {"height": 512}, {"steps": 5}, {"lora_strength": 0.5},
               {"lora": str(tmp_path / "b")}, {"reference": str(tmp_path / "a")}, {"id": "i"}]
    variants = [rows.Row(**(vars(row) | change)) for change in changes]
    names = {rows.name(each, {"model": "m"}) for each in (row, *variants)} | {rows.name(row, {"model": "n"})}
    assert len(names) == len(changes) + 2
    assert rows.name(rows.Row("a", lora=str(tmp_path / "moved")), {"model": "m"}) == rows.name(row, {"model": "m"})


def test_every_image_is_in_the_manifest_with_its_hash(whole):
    table = {row["name"]: row for row in manifest.read(whole)}
    assert {f"{name}.png" for name in table} == images(whole).keys() and len(table) == 6
    for name, row in table.items():
        assert stages.hashlib.sha256((whole / f"{name}.png").read_bytes()).hexdigest() == row["sha256"]
        assert row["seconds"] > 0 and row["worker"] and row["source"] and row["dtype"] == "float32"
    assert sorted((row["prompt"], row["seed"]) for row in table.values()) == sorted(
        (prompt, seed) for prompt in PROMPTS for seed in (0, 1))


def test_an_image_is_the_one_that_generate_makes(whole, tmp_path):
    out = tmp_path / "a.png"
    words = [word for word in COMMON if word not in ("--threads", 1)]
    assert main([str(word) for word in ("generate", "--prompt", PROMPTS[2], "--seed", 1, "--out", out, *words)]) == 0
    (row,) = [row for row in manifest.read(whole) if (row["prompt"], row["seed"]) == (PROMPTS[2], 1)]
    assert Image.open(out).tobytes() == Image.open(whole / f"{row['name']}.png").tobytes()


def test_shards_are_parts_of_the_whole(prompts, whole, tmp_path):
    for i in (1, 2, 3):
        assert batch(prompts, tmp_path, "--seeds", 2, shard=f"{i}/3") == 0
        assert len(images(tmp_path)) == 2 * i
    assert images(tmp_path) == images(whole) and len(manifest.read(tmp_path)) == 6


def test_a_batch_is_filled_up_so_that_neighbours_do_not_matter(prompts, tmp_path):
    assert batch(prompts, tmp_path / "a", "--per-device-batch", 4) == 0
    (tmp_path / "one.txt").write_text(PROMPTS[1])
    assert batch(tmp_path / "one.txt", tmp_path / "b", "--per-device-batch", 4) == 0
    ((name, image),) = images(tmp_path / "b").items()
    assert images(tmp_path / "a")[name] == image


def test_a_rerun_makes_only_what_is_missing(prompts, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lost, unrecorded = sorted(out.glob("*.png"))[:2]
    lost.unlink()  # its manifest row is stale
    (part,) = (out / "manifest").glob("*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.filter(pa.array([name != unrecorded.stem for name in table["name"].to_pylist()])), part)
    made = []
    original = stages.Denoise.run
    monkeypatch.setattr(stages.Denoise, "run", lambda self, group: made.extend(
        row["name"] for row in group) or original(self, group))
    assert batch(prompts, out, "--seeds", 2, "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "image", "end"] and events[0]["done"] == 5
    assert made == [lost.stem] and images(out) == images(whole)
    kept = {row["name"]: row["sha256"] for row in manifest.read(whole)}
    assert {row["name"]: row["sha256"] for row in manifest.read(out)} == kept
    parts = [pq.read_table(path) for path in (out / "manifest").glob("*.parquet")]
    assert sum(map(len, parts)) == 6, "an image is recorded twice"


def test_a_row_that_fails_is_listed_and_tried_again(prompts, whole, tmp_path, capsys, monkeypatch):
    def fail(self, group):
        if group[0]["prompt"] == PROMPTS[0]:
            raise RuntimeError("no memory left\nfor this")
        return original(self, group)

    original = stages.Denoise.run
    with monkeypatch.context() as patch:
        patch.setattr(stages.Denoise, "run", fail)
        assert batch(prompts, tmp_path, "--seeds", 2, "--rows-per-task", 4) == 1
    said = capsys.readouterr()
    assert f"{PROMPTS[0]!r}, seed 1: RuntimeError: no memory left for this\n" in said.err
    assert "4 images made" in said.out and "2 failed" in said.out and len(images(tmp_path)) == 4
    assert batch(prompts, tmp_path, "--seeds", 2) == 0 and images(tmp_path) == images(whole)


def test_a_full_disk_loses_nothing(prompts, whole, tmp_path, capsys, monkeypatch):
    """Neither half an image nor the record of one that was written."""
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        assert batch(prompts, tmp_path, "--seeds", 2) == 1
    assert capsys.readouterr().err.count("No space left on device") == 6
    assert not images(tmp_path) and not list(tmp_path.glob(".*.tmp"))
    original = manifest.Manifest._write
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "_write", lambda *_: full(0))
        assert batch(prompts, tmp_path, "--seeds", 2) == 1
    assert "the same command records them" in capsys.readouterr().err and images(tmp_path) == images(whole)
    assert original is manifest.Manifest._write and batch(prompts, tmp_path, "--seeds", 2) == 0
    assert len(manifest.read(tmp_path)) == 6


def test_a_row_that_three_workers_died_on_is_given_up(prompts, whole, tmp_path, capsys):
    (tmp_path / stages.STARTED).mkdir()
    name = next(row["name"] for row in manifest.read(whole) if row["prompt"] == PROMPTS[0])
    (tmp_path / stages.STARTED / f"{name}.denoise").write_bytes(b"...")
    assert batch(prompts, tmp_path, "--seeds", 2) == 1
    assert "3 workers died on it in the stage denoise" in capsys.readouterr().err
    assert images(tmp_path).keys() == images(whole).keys() - {f"{name}.png"}


def test_a_lora_changes_the_image_by_its_strength(tmp_path):
    lora = str(MINIATURE / "blue_pot_lora.safetensors")
    records = [{"prompt": PROMPTS[0], "lora": lora, "lora_strength": strength} for strength in (0.0, 1.0)]
    path = write_table(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0]}, *records])
    assert batch(path, tmp_path / "out", "--seeds", 1) == 0
    made = {(row["lora"] != "", row["lora_strength"]): Image.open(tmp_path / "out" / f"{row['name']}.png").tobytes()
            for row in manifest.read(tmp_path / "out")}
    assert made[False, 1.0] == made[True, 0.0] != made[True, 1.0]


def test_a_reference_reaches_the_image(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    path = write_table(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "reference": "red.png"}])
    assert batch(path, tmp_path / "out") == 0
    assert len(set(images(tmp_path / "out").values())) == 2


@pytest.mark.parametrize("name, content, words", [
    ("a.safetensors", b"nothing", "a whole safetensors file"),
    ("vae.safetensors", None, "a LoRA for FLUX.2 Klein 4B")], ids=["damaged", "something else"])
def test_a_lora_that_is_none_fails_its_row_alone(name, content, words, tmp_path, capsys):
    if content is None:
        shutil.copy(MINIATURE / "ternary" / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    path = write_table(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "lora": name}])
    assert batch(path, tmp_path / "out") == 1
    assert words in capsys.readouterr().err and len(images(tmp_path / "out")) == 1
