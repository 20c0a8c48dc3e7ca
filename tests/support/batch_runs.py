"""Runs of ``bonsai-image batch`` in processes of their own, with workers and drivers killed on the way."""

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bonsai_image.standalone.batch import manifest, stages
from bonsai_image.standalone.cli import main

MINIATURE = Path(__file__).parents[2] / "miniature"
COMMON = ("--checkpoint", MINIATURE / "ternary", "--width", 64, "--height", 64, "--steps", 2, "--device", "cpu",
          "--dtype", "fp32", "--threads", 1)
PROMPTS = ("three red circles on a white background", "a large yellow ring on a grey background")


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def driver(prompts: Path, out: Path, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "bonsai_image", "batch", prompts, "--out", out, *COMMON, "--json", *words]
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
    """Run to the end, with random workers and drivers killed on the way; how many really were. Continues a run that
    was killed itself, from its first image that is missing."""
    chance, killed = random.Random(seed), {"workers": 0, "drivers": 0}
    # Evenly through the run: a kill is due when that many images are there.
    due = [(round((i + 1) * count / (kills + 2)), "workers") for i in range(kills)]
    due = sorted(due + [(round((i + 0.5) * count / (driver_kills + 1)), "drivers") for i in range(driver_kills)])
    due = [each for each in due if each[0] > len(list(out.glob("*.png")))]
    process = driver(prompts, out, "--rows-per-task", 4, "--seeds", count // len(PROMPTS))
    while process.poll() is None:
        if due and len(list(out.glob("*.png"))) >= due[0][0]:
            if due[0][1] == "drivers":
                process.kill()
                process.communicate()
                process = driver(prompts, out, "--rows-per-task", 4, "--seeds", count // len(PROMPTS))
            elif victims := workers(process):
                assert listening(process) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
                    chance.choice(victims).kill()
            else:
                continue
            killed[due.pop(0)[1]] += 1
            print(killed, len(list(out.glob("*.png"))), flush=True)
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


def batch(prompts, out, *words, shard="1/1") -> int:
    """Run it in this process, without Ray; its exit status."""
    return main([str(word) for word in ("batch", prompts, "--out", out, *COMMON, "--shards", shard, *words)])


def write_table(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        lines = [",".join(records[0]), *(",".join(f'"{value}"' for value in each.values()) for each in records)]
        path.write_text("\n".join(lines))
    return path
