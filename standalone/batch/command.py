"""The command ``batch``: from the options to the images, and what it says of them."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...ops.backends import Setting
from ...ops.devices import DTYPES, default_dtype
from ..generate import Compute, complete_repository, device_named
from . import pipeline, rows, workflow
from .manifest import Manifest
from .stages import STARTED, Record, Work

#: Age in seconds at which the writer of a temporary file no longer exists.
_STALE = 3600


class Report:
    """Says what happens: a progress bar and sentences on stderr, or a JSON event per line on stdout."""

    def __init__(self, total: int, json: bool):
        self.total, self.json, self._stdout = total, json, sys.stdout
        self.failed = self.made = 0
        self._start = time.monotonic()
        self._bar = tqdm(total=self.total, unit="image", disable=self.json, smoothing=0.05)

    def event(self, event: str, **facts: Any) -> None:
        if self.json:
            print(json.dumps({"event": event} | facts), file=self._stdout, flush=True)

    def image(self, row: Record) -> None:
        self.made += 1
        self._bar.update()
        rate = self.made / (time.monotonic() - self._start)
        self.event("image", name=row["name"], id=row["id"], done=self.made, total=self.total,
                   images_per_second=round(rate, 3), seconds_left=round((self.total - self.made - self.failed) / rate))

    def failure(self, what: str, error: str) -> None:
        self.failed += 1
        if self.json:
            self.event("failed", row=what, error=error)
        else:
            tqdm.write(f"bonsai-image: {what}: {error}", file=sys.stderr)

    def end(self) -> None:
        self._bar.close()
        self.event("end", made=self.made, failed=self.failed)


def _sources(args: argparse.Namespace) -> Iterator[rows.Row | ValueError]:
    settings = {name: getattr(args, name) for name in ("seed", "width", "height", "steps")}
    folder = Path()
    if args.workflow is not None:
        settings |= workflow.settings(args.workflow)
        folder = args.workflow.absolute().parent
    for text in args.set:
        column, equals, value = text.partition("=")
        if not equals or column not in rows.COLUMNS:
            raise ValueError(f"--set {text}: give one of {', '.join(rows.COLUMNS)}, an equals sign and a value")
        settings[column] = str(Path(value).absolute()) if column in ("reference", "lora") else value
    if args.prompts is None and "prompt" not in settings:
        raise ValueError("give a file of prompts, --workflow, or --set prompt=...")
    defaults = rows.make({"prompt": "of each row"} | settings, rows.Row(""), folder)
    if args.prompts is None:
        found = [defaults]
    else:
        found = rows.read(args.prompts, replace(defaults, prompt=settings.get("prompt", "")))
    for row in found:
        yield from [row] if isinstance(row, ValueError) else (
            replace(row, seed=row.seed + i) for i in range(args.seeds))


def _compute(args: argparse.Namespace) -> tuple[Compute, pipeline.Pools]:
    """Where the model runs, and the workers. Joins the cluster, if one is given, and uses its GPUs."""
    device = device_named(args.device) if args.device or not args.address else torch.device("cpu")
    local_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    devices = args.devices or max(1, local_gpus)
    threads = args.threads or max(1, (os.cpu_count() or 1) // devices)
    pools = pipeline.Pools(args.encoders, devices, local_gpus, threads)
    if args.address and (gpus := pipeline.start(args.address, pools)) and not args.device:
        device, pools = torch.device("cuda"), replace(pools, gpus=gpus, devices=args.devices or gpus)
    dtype = DTYPES.get(args.dtype) or (
        pipeline.default_dtype_there(device, pools) if args.address else default_dtype(device))
    if args.shards is None:
        device = torch.device(device.type)  # Ray shows a worker its GPU as the only one
    return Compute(device, dtype, Setting(args.backend, args.precision)), pools


def run(args: argparse.Namespace) -> int:
    """Make the images that are missing. Returns 1 if a row failed, else 0. Raises ModelFileError, ValueError or
    OSError."""
    if args.shards is not None and args.address is not None:
        raise ValueError("--shards works without Ray; leave out --address")
    given = (args.checkpoint, args.transformer, args.vae)
    repository = complete_repository(*(path and path.absolute() for path in given))
    found = list(_sources(args))
    compute, pools = _compute(args)
    common = {"model": rows.model_digest(repository), "dtype": str(compute.dtype).split(".")[1],
              "precision": args.precision, "batch": args.per_device_batch}
    wanted = {rows.name(row, common): row for row in found if isinstance(row, rows.Row)}
    number, count = args.shards or (1, 1)
    wanted = dict(list(wanted.items())[number - 1::count])
    (args.out / STARTED).mkdir(parents=True, exist_ok=True)
    # Those workers died with their driver, not because of a row. The processes of other shards may be at work.
    if args.shards is None:
        for mark in (args.out / STARTED).iterdir():
            mark.unlink(missing_ok=True)
    _remove_partial(args.out, wanted)
    manifest = Manifest(args.out, common)
    done = manifest.done(set(wanted))
    todo = {name: row for name, row in wanted.items() if name not in done}
    report = Report(len(todo), args.json)
    report.event("start", images=len(wanted), done=len(done), device=str(compute.device), out=str(args.out))
    for error in (row for row in found if isinstance(row, ValueError)):
        report.failure(*str(error).split(": ", 1))
    work = Work(replace(repository, problems={}), args.out.absolute(), compute, args.per_device_batch, pools.threads)
    if todo:
        _make(rows.tasks(todo, args.rows_per_task or args.per_device_batch), work, pools, args, manifest, report)
    _remove_partial(args.out, wanted)
    report.end()
    if not args.json:
        print(f"{args.out}: {report.made} images made, {len(done)} were there, {report.failed} failed")
    return 1 if report.failed else 0


def _make(tasks: Iterator[list[Record]], work: Work, pools: pipeline.Pools, args: argparse.Namespace,
          manifest: Manifest, report: Report) -> None:
    """Run the tasks, and record and report what comes of them, also when the run is cancelled."""
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints on stdout which workers died
        if args.shards is None and args.address is None:
            pipeline.start(None, pools)
        made = pipeline.on_ray(tasks, work, pools) if args.shards is None else pipeline.here(tasks, work)
        try:
            for row in made:
                if "error" in row:
                    report.failure(row["id"] or f"{row['prompt'][:60]!r}, seed {row['seed']}", row["error"])
                else:
                    manifest.add(row)
                    report.image(row)
        finally:
            if problem := manifest.flush():
                report.failure(str(args.out), problem)


def _remove_partial(out: Path, names: Container[str]) -> None:
    """Remove what killed writers left: files of ``names``, which nobody writes now, and old ones."""
    for path in (*out.glob(".*.tmp"), *out.glob("manifest/.*.tmp")):
        with contextlib.suppress(FileNotFoundError):  # another run has just given it its name
            if path.name.split(".")[1] in names or time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
