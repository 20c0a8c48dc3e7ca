"""``bonsai-image batch`` on a Ray of its own: killed workers, a killed driver, a row that kills, the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from bonsai_image.standalone.batch import manifest, stages

MINIATURE = Path(__file__).parent.parent / "miniature"
COMMON = ("--checkpoint", MINIATURE / "ternary", "--width", 64, "--height", 64, "--steps", 2, "--device", "cpu",
          "--dtype", "fp32", "--threads", 1, "--json")
PROMPTS = ("three red circles on a white background", "a large yellow ring on a grey background")


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def driver(prompts: Path, out: Path, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "bonsai_image", "batch", prompts, "--out", out, *COMMON, *words]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen, status: int = 0) -> list[dict]:
    """The events of a driver that ends with ``status``."""
    said, complaints = process.communicate(timeout=500)
    assert process.returncode == status, complaints
    return [json.loads(line) for line in said.splitlines()]


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of this driver's Ray that run a stage."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            name = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if name.startswith("ray::") and any(stage.__name__ in name for stage in stages.STAGES):
            found.append(child)
    return found


def listening(process: subprocess.Popen) -> set[str]:
    """The addresses at which this driver and its Ray accept connections."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    found = set()
    for each in family:
        try:
            found |= {connection.laddr.ip for connection in each.net_connections("inet")
                      if connection.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def disturbed(prompts: Path, out: Path, count: int, kills: int, driver_kills: int, seed: int = 0) -> dict[str, int]:
    """Run to the end, with random workers and drivers killed on the way; how many really were."""
    chance, killed = random.Random(seed), {"workers": 0, "drivers": 0}
    # Evenly through the run: a kill is due when that many images are there.
    due = [(round((i + 1) * count / (kills + 2)), "workers") for i in range(kills)]
    due = sorted(due + [(round((i + 0.5) * count / (driver_kills + 1)), "drivers") for i in range(driver_kills)])
    process = driver(prompts, out, "--rows-per-task", 4, "--seeds", count // len(PROMPTS))
    while process.poll() is None:
        if due and len(list(out.glob("*.png"))) >= due[0][0]:
            if due[0][1] == "drivers":
                process.kill()
                process.communicate()
                process = driver(prompts, out, "--rows-per-task", 4, "--seeds", count // len(PROMPTS))
            elif victims := workers(process):
                assert listening(process) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
                chance.choice(victims).kill()
            else:
                continue
            killed[due.pop(0)[1]] += 1
        time.sleep(0.05)
    finished(process)
    return killed


def assert_whole(out: Path, reference: Path, count: int) -> None:
    """All images, each recorded once, byte for byte those of an undisturbed run."""
    expected = images(reference)
    assert len(expected) == count and images(out) == expected
    tables = [pq.read_table(path) for path in (out / "manifest").glob("*.parquet")]
    recorded = [name for table in tables for name in table["name"].to_pylist()]
    assert sorted(f"{name}.png" for name in recorded) == sorted(expected)
    assert {row["name"]: row["sha256"] for row in manifest.read(out)} == \
        {row["name"]: row["sha256"] for row in manifest.read(reference)}
    assert not list(out.glob(".*.tmp")) and not list((out / stages.STARTED).iterdir())


def test_ray_makes_the_images_of_a_single_process_though_workers_are_killed(tmp_path):
    prompts = write_prompts(tmp_path)
    finished(driver(prompts, tmp_path / "a", "--shards", "1/1", "--seeds", 60))
    killed = disturbed(prompts, tmp_path / "b", 120, kills=2, driver_kills=0)
    assert killed["workers"] == 2
    assert_whole(tmp_path / "b", tmp_path / "a", 120)


@pytest.mark.slow
def test_nothing_is_lost_or_made_twice_when_workers_and_drivers_are_killed(tmp_path):
    prompts = write_prompts(tmp_path)
    finished(driver(prompts, tmp_path / "a", "--shards", "1/1", "--seeds", 100))
    killed = disturbed(prompts, tmp_path / "b", 200, kills=5, driver_kills=1)
    assert killed == {"workers": 5, "drivers": 1}
    assert_whole(tmp_path / "b", tmp_path / "a", 200)


@pytest.mark.slow
def test_a_row_that_kills_its_worker_is_given_up_after_three(tmp_path):
    """The others are made; the row is tried again by the next run."""
    code = ("import os, sys; from bonsai_image.standalone.batch import stages; from bonsai_image.__main__ import main\n"
            "real = stages.Denoise.run\n"
            "def run(self, group, data):\n"
            f"    if group[0]['prompt'] == {PROMPTS[0]!r}: os._exit(9)\n"
            "    return real(self, group, data)\n"
            "stages.Denoise.run = run; sys.exit(main())")
    words = ["batch", write_prompts(tmp_path), "--out", tmp_path / "out", *COMMON, "--shards", "1/1"]
    for expected in (9, 9, 9, 1):
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["error"] for event in events if event["event"] == "failed"] == [
        "3 workers died on it in the stage denoise"]
    assert len(images(tmp_path / "out")) == 1


@pytest.mark.slow
def test_cancelling_ends_ray_with_its_workers(tmp_path):
    process = driver(write_prompts(tmp_path), tmp_path / "out", "--seeds", 5000)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 130 and complaints.strip().endswith("bonsai-image: cancelled."), complaints
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    finally:
        process.kill()
