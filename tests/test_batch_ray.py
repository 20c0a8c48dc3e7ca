"""``bonsai-image batch`` on a Ray of its own: killed workers, a killed driver, a row that kills, the same bits."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bonsai_image.tests.support.batch_runs import (
    COMMON,
    PROMPTS,
    assert_whole,
    batch,
    disturbed,
    driver,
    finished,
    images,
    write_prompts,
)


def test_ray_makes_the_images_of_a_single_process_though_a_worker_is_killed(tmp_path):
    prompts = write_prompts(tmp_path)
    assert batch(prompts, tmp_path / "a", "--seeds", 12) == 0
    killed = disturbed(prompts, tmp_path / "b", 24, kills=1, driver_kills=0)
    assert killed["workers"] == 1
    assert_whole(tmp_path / "b", tmp_path / "a", 24)


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
            "def run(self, group):\n"
            f"    if group[0]['prompt'] == {PROMPTS[0]!r}: os._exit(9)\n"
            "    return real(self, group)\n"
            "stages.Denoise.run = run; sys.exit(main())")
    words = ["batch", write_prompts(tmp_path), "--out", tmp_path / "out", *COMMON, "--shards", "1/1", "--json"]
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
