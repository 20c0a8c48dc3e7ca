"""The parts of ``bonsai-image batch`` one by one: groups of rows, what a stage remembers, what a killed run leaves."""

import itertools
import os
from multiprocessing.pool import ThreadPool

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bonsai_image import disk
from bonsai_image.loaders import ModelFileError
from bonsai_image.standalone.batch import manifest, rows, stages
from bonsai_image.standalone.generate import Compute, complete_repository, save_png
from bonsai_image.tests.support.batch_runs import MINIATURE, PROMPTS, batch, images, write_table


@pytest.fixture
def work(tmp_path) -> stages.Work:
    (tmp_path / stages.STARTED).mkdir()
    repository = complete_repository(MINIATURE / "ternary")
    return stages.Work(repository, tmp_path, Compute(torch.device("cpu"), torch.float32), 4, 1)


class Doubles(stages.Stage):
    """Doubles the bytes of its rows, all in one group, and fails on a group with a row named bad."""

    def groups(self, rows):
        yield rows

    def run(self, rows):
        if any(row["name"] == "bad" for row in rows):
            raise RuntimeError("bad row")
        return [row["data"] * 2 for row in rows]


def test_a_row_that_fails_in_a_group_leaves_the_others_theirs(work):
    rows = [{"name": name, "seconds": 0.0, "data": torch.tensor([i])} for i, name in enumerate(["a", "b", "bad", "c"])]
    found = {row["name"]: row for row in stages.received(Doubles(work)(stages.sent(rows)))}
    assert found["bad"]["error"] == "RuntimeError: bad row"
    assert {name: row["data"].tolist() for name, row in found.items() if "error" not in row} == {
        "a": [0], "b": [2], "c": [6]}
    assert not list((work.out / stages.STARTED).iterdir())


def test_seeds_of_a_prompt_share_its_embeddings(work):
    task = stages.sent([{"name": str(i), "prompt": prompt, "seconds": 0.0, "data": None}
                        for i, prompt in enumerate((PROMPTS[0], PROMPTS[0], PROMPTS[1]))])
    task = stages.Encode(work)(task)
    first, second, third = (row["data"] for row in stages.received(task))
    assert first.data_ptr() == second.data_ptr() != third.data_ptr() and not torch.equal(first, third)
    assert 2 * first.nbytes < len(task["task"]) < 2.5 * first.nbytes


def test_a_row_that_a_worker_died_on_is_denoised_alone(work):
    """And one with a longer prompt, whose embeddings have more tokens."""
    denoise = stages.Denoise(work)
    (work.out / stages.STARTED / "c.denoise").write_bytes(b".")
    groups = denoise.groups([{"name": name, "data": torch.zeros(9 if name == "e" else 8)} for name in "abcdefg"])
    assert ["".join(row["name"] for row in group) for group in groups] == ["c", "abdf", "g", "e"]


@pytest.mark.parametrize("column", ["lora", "lora_strength", "reference", "width", "height", "steps"])
def test_a_task_has_rows_of_one_kind(column):
    """What a batch is denoised with is that of its first row."""
    values = ("a", "b") if column in ("lora", "reference") else (16, 32)
    table = {f"{seed}{value}": rows.Row("a", seed, **{column: value}) for seed in range(3) for value in values}
    tasks = list(rows.tasks(table, 4))
    assert [len({row[column] for row in each}) for each in tasks] == [1, 1]
    assert sorted(row["name"] for each in tasks for row in each) == sorted(table)


def test_every_lora_reaches_the_rows_that_name_it(tmp_path):
    """A worker keeps one LoRA, so another one has to replace it."""
    tensors = load_file(MINIATURE / "blue_pot_lora.safetensors")
    for name, sign in (("a", 1), ("b", -1)):
        signed = {key: tensor * sign if "lora_B" in key else tensor for key, tensor in tensors.items()}
        save_file(signed, tmp_path / f"{name}.safetensors")
    both = [{"prompt": PROMPTS[0], "lora": f"{name}.safetensors"} for name in "ab"]
    assert batch(write_table(tmp_path / "both.jsonl", both), tmp_path / "both") == 0
    alone = write_table(tmp_path / "alone.jsonl", [{"prompt": PROMPTS[0], "lora": "b.safetensors"}])
    assert batch(alone, tmp_path / "alone") == 0
    ((name, image),) = images(tmp_path / "alone").items()
    assert len(set(images(tmp_path / "both").values())) == 2 and images(tmp_path / "both")[name] == image


def test_a_photograph_is_turned_the_way_its_camera_was_held(tmp_path):
    """A phone stores its pictures sideways, with the direction beside them."""
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(tmp_path / "upright.png")
    turned.save(tmp_path / "sideways.png", exif=exif)
    path = write_table(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0], "reference": f"{name}.png"}
                                              for name in ("upright", "sideways")])
    assert batch(path, tmp_path / "out") == 0
    made = {Image.open(tmp_path / "out" / name).tobytes() for name in images(tmp_path / "out")}
    assert len(made) == 1 and len(images(tmp_path / "out")) == 2


def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a.png"
    disk.write_whole(path, b"older")
    before = path.stat().st_ino
    disk.write_whole(path, b"old")
    assert path.stat().st_ino != before  # a new file took the place of the old one, which nobody wrote into
    monkeypatch.setattr(disk.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        disk.write_whole(path, b"newer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_rows_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    record = manifest.Manifest(tmp_path, {})
    record.add({"name": "a"})
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left on device" in record.flush()
    assert record.flush() is None and [row["name"] for row in manifest.read(tmp_path)] == ["a"]


def test_an_image_that_two_processes_recorded_is_recorded_once(tmp_path):
    (tmp_path / "a.png").touch()
    for _ in range(2):
        record = manifest.Manifest(tmp_path, {})
        record.add({"name": "a"})
        record.flush()
    assert manifest.Manifest(tmp_path, {}).done({"a"}) == {"a"}
    assert [pq.read_table(path).num_rows for path in (tmp_path / "manifest").glob("*.parquet")].count(1) == 1


def test_two_runs_in_one_folder_record_every_image_once(tmp_path):
    """At once: they find the same stale rows, and each makes the images that the other makes."""
    for name in "abcd":
        save_png(Image.new("RGB", (8, 8)), dict.fromkeys(manifest.SETTINGS) | {"name": name}, tmp_path / f"{name}.png")
    old = manifest.Manifest(tmp_path, {})
    for name in "axb":
        old.add({"name": name})
    old.flush()

    def run(_):
        record = manifest.Manifest(tmp_path, {})
        record.done({*"abcxe"})
        record.add({"name": "d"})
        return record.flush()

    with ThreadPool(4) as pool:
        assert pool.map(run, range(4)) == [None] * 4
    tables = [pq.read_table(path)["name"].to_pylist() for path in (tmp_path / "manifest").glob("*.parquet")]
    assert sorted(itertools.chain(*tables)) == [*"abcd"]


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", b"half a file"], ids=["empty", "header", "garbage"])
def test_what_a_crash_has_damaged_is_made_again(damage, tmp_path):
    (tmp_path / "a.png").write_bytes(damage)
    record = manifest.Manifest(tmp_path, {})
    assert record.done({"a"}) == set()
    (tmp_path / "manifest" / "0.parquet").write_bytes(damage)
    record.add({"name": "b"})
    assert "remove it" in record.flush()
    with pytest.raises(ModelFileError, match="remove it, and the same command records"):
        record.done({"a"})


def test_a_file_that_another_run_took_for_a_leftover_is_written_again(tmp_path, monkeypatch):
    fsync, taken = os.fsync, []

    def take(descriptor):
        fsync(descriptor)
        for path in tmp_path.glob(".*.tmp") if not taken else ():
            taken.append(path.unlink())

    monkeypatch.setattr(os, "fsync", take)
    disk.write_whole(tmp_path / "a.png", b"whole")
    assert taken and (tmp_path / "a.png").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_what_a_system_leaves_in_a_folder_makes_no_other_image(tmp_path):
    folder = tmp_path / "model"
    for name in ("config.json", "model.safetensors", "tokenizer/vocab.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    known = rows.digest(folder)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._model.safetensors", "tokenizer/.DS_Store", "Icon\r",
                 ".cache/a.json", "notes.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    rows.digest.cache_clear()
    assert rows.digest(folder) == known
    (folder / "tokenizer" / "vocab.json").write_text("another")
    rows.digest.cache_clear()
    assert rows.digest(folder) != known


def test_only_what_nobody_writes_is_removed(tmp_path):
    """Half a file of this run's own rows, or an old one; a new one of another name may be in the making."""
    path = write_table(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0]}])
    out = tmp_path / "out"
    assert batch(path, out) == 0
    ((image, _),) = images(out).items()
    ours, foreign, old = out / f".{image}.0.tmp", out / ".other.png.0.tmp", out / ".old.png.0.tmp"
    for each in (ours, foreign, old):
        each.touch()
    os.utime(old, (0, 0))
    (out / ".gone.png.0.tmp").symlink_to("nowhere")  # as if it was renamed between the list and the look
    assert batch(path, out) == 0 and [foreign.exists(), ours.exists(), old.exists()] == [True, False, False]
