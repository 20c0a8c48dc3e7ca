"""What ``bonsai-image batch`` costs: measured with the miniature on this machine, or modelled for many workers.

    python benchmarks/batch.py --measure [--images 2000]
    python benchmarks/batch.py --kill [--images 2000 --workers-killed 50 --drivers-killed 5]
    python benchmarks/batch.py --simulate [--seconds 1.5 --restart 30 --rows-per-task 4]

``--measure`` compares a single process with Ray, and one denoising worker with two. ``--kill`` kills workers and the
driver at random and compares every byte with an undisturbed run. ``--simulate`` is a model, not a measurement: workers
that denoise and die at a rate, a driver that hands out one task at a time, a shared disk.
"""

import argparse
import heapq
import json
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil

from bonsai_image.tests.support.batch_runs import assert_whole, disturbed, driver, finished, write_prompts

WORKERS = (1, 8, 64, 256, 1000)
#: Failures of a worker per hour: none, one in ten hours (cheap, preemptible machines), one an hour.
RATES = (0, 0.1, 1)


def resident(process: psutil.Process) -> float:
    """Megabytes of a process with its children, shared pages counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1e6


def timed(prompts: Path, out: Path, images: int, *words) -> dict[str, float]:
    """Seconds to the first image and from there to the last; peak MB until and after a tenth; CPU seconds of driver."""
    begin = time.perf_counter()
    process = driver(prompts, out, "--seeds", images // 2, "--width", 128, "--height", 128, "--steps", 4, *words)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    samples, times, cpu = [], [], 0.0
    observed = psutil.Process(process.pid)

    def sample() -> None:
        while process.poll() is None:
            samples.append((len(times), resident(observed)))
            time.sleep(2)

    threading.Thread(target=sample, daemon=True).start()
    for line in process.stdout:
        if json.loads(line)["event"] == "image":
            times.append(time.perf_counter() - begin)
            if len(times) % 100 == 0:
                cpu = sum(observed.cpu_times()[:2])
    if process.wait() or len(times) != images:
        raise SystemExit(f"{len(times)} of {images} images")
    return {"first": times[0], "rest": times[-1] - times[0], "rate": (images - 1) / (times[-1] - times[0]), "cpu": cpu,
            "early": max(megabytes for done, megabytes in samples if done <= images // 10),
            "late": max(megabytes for done, megabytes in samples if done > images // 10)}


def measure(images: int) -> None:
    runs = {"one process": ("--shards", "1/1"), "Ray, 1 worker": ("--rows-per-task", 16),
            "Ray, 2 workers": ("--rows-per-task", 16, "--devices", 2)}
    print(f"{images} images of the miniature, 128 x 128, 4 steps, FP32, one thread per worker, "
          f"{psutil.cpu_count()} CPU cores\n\n| | first image, s | then, s | images/s | of one process | "
          "peak MB in the first tenth | after it | driver's CPU s |\n" + "|---" * 8 + "|")
    alone = None
    for name, words in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found = timed(write_prompts(Path(folder)), Path(folder) / "out", images, *words)
        alone = alone or found
        print(f"| {name} | {found['first']:.1f} | {found['rest']:.1f} | {found['rate']:.2f} | "
              f"{found['rate'] / alone['rate']:.2f} | {found['early']:.0f} | {found['late']:.0f} | "
              f"{found['cpu']:.1f} |", flush=True)


def kill(images: int, workers: int, drivers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prompts = write_prompts(root)
        finished(driver(prompts, root / "undisturbed", "--shards", "1/1", "--seeds", images // 2))
        killed = disturbed(prompts, root / "out", images, workers, drivers)
        assert_whole(root / "out", root / "undisturbed", images)
    print(f"{killed['workers']} workers and {killed['drivers']} drivers killed; {images} images, none lost, none "
          "twice, every byte as undisturbed")


def simulate(workers: int, rate: float, args: argparse.Namespace, seed: int = 0) -> dict[str, float]:
    """One run of ``args.images`` images per worker: images per hour, and shares of the time: useful, lost to deaths,
    driver and disk busy."""
    chance = random.Random(seed)
    tasks = workers * args.images // args.rows_per_task
    work = args.seconds * args.rows_per_task
    content = args.megabytes * args.rows_per_task / args.disk
    free = [0.0] * workers  # when each worker takes its next task
    dispatched = disk = lost = 0.0
    done = 0
    while done < tasks:
        start = dispatched = max(heapq.heappop(free), dispatched) + args.dispatch
        life = chance.expovariate(rate / 3600) if rate else float("inf")
        if life < work:  # the task is run again by whoever is free
            lost += life
            heapq.heappush(free, start + life + args.restart)
            continue
        disk = max(disk, start + work) + content
        # A full disk queue holds up the worker: back-pressure.
        heapq.heappush(free, max(start + work, disk - args.queue * content))
        done += 1
    end = max(disk, *free)
    return {"hour": 3600 * done * args.rows_per_task / end, "efficiency": done * work / (end * workers),
            "lost": lost / (lost + done * work), "driver": args.dispatch * done / end, "disk": content * done / end}


def table(args: argparse.Namespace) -> None:
    print(f"Modelled: {args.seconds} s to denoise an image, {args.rows_per_task} rows per task, "
          f"{args.dispatch * 1e3:g} ms of the driver per task, {args.restart:g} s until a dead worker is replaced, "
          f"{args.megabytes:g} MB per image, {args.disk:g} MB/s of shared disk\n\n"
          "| workers | deaths per worker and hour | images per hour | efficiency | work lost | driver busy | "
          "disk busy |\n" + "|---" * 7 + "|")
    for workers in WORKERS:
        for rate in RATES:
            found = simulate(workers, rate, args)
            print(f"| {workers:,} | {rate} | {found['hour']:,.0f} | {found['efficiency']:.1%} | {found['lost']:.2%} | "
                  f"{found['driver']:.1%} | {found['disk']:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    for name in ("--measure", "--kill", "--simulate"):
        mode.add_argument(name, action="store_true")
    parser.add_argument("--images", type=int, help="in all (2000); with --simulate per worker (400)")
    parser.add_argument("--workers-killed", type=int, default=50)
    parser.add_argument("--drivers-killed", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="to denoise one image")
    parser.add_argument("--rows-per-task", type=int, default=4)
    parser.add_argument("--dispatch", type=float, default=0.02, help="the driver's seconds per task, all stages")
    parser.add_argument("--restart", type=float, default=30, help="seconds until a dead worker is replaced")
    parser.add_argument("--megabytes", type=float, default=1.6, help="of a PNG")
    parser.add_argument("--disk", type=float, default=2000, help="MB/s that the shared disk takes")
    parser.add_argument("--queue", type=int, default=64, help="tasks that wait for the disk before workers do")
    args = parser.parse_args()
    args.images = args.images or (400 if args.simulate else 2000)
    if args.measure:
        measure(args.images)
    elif args.kill:
        kill(args.images, args.workers_killed, args.drivers_killed)
    else:
        table(args)


if __name__ == "__main__":
    main()
