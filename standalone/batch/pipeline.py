"""Tasks through the four stages: in this process, or as a Ray Data pipeline of actor pools.

Ray Data brings what a queue of our own would have to: a task whose worker died is run again by a new one, an object
that went with its machine is computed again, and a stage waits when the one behind it is slower.
"""

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...ops.backends import libraries
from .stages import STAGES, Work

RAY = libraries.Library("ray", "ray.data", "2.50", "pip install --upgrade 'ray[data]'",
                        "pip install --force-reinstall 'ray[data]'")

#: Tasks that Ray Data is handed at a time, which bounds what the driver keeps of them.
_WAVE = 20_000
#: Shares of a GPU: a half for all that denoise on it, a quarter for an encoder and a decoder. One divides the other,
#: so that they fill GPUs without a gap.
_DENOISE_SHARE, _OTHER_SHARE = 0.5, 0.25
#: Bytes of the object store, between all stages, for each worker that denoises, and at least.
_STORE_BYTES, _LEAST_STORE_BYTES = 256 << 20, 512 << 20

#: What a cluster may want that refuses to be joined.
_TOKEN = ("; if it runs and authenticates, as ray start --head makes it, copy ~/.ray/auth_token from its first machine "
          "and set RAY_AUTH_MODE=token")

Rows = list[dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Pools:
    """Workers of each stage; ``gpus`` is how many GPUs they share, 0 to run on CPUs with ``threads`` each."""

    encoders: int
    devices: int
    gpus: int
    threads: int

    def workers(self) -> tuple[int, ...]:
        """For :data:`STAGES`: as many decode and write as denoise."""
        return self.encoders, self.devices, self.devices, max(1, self.devices // 4)

    def resources(self) -> list[dict[str, float]]:
        """What Ray reserves for one worker of each stage."""
        if not self.gpus:
            return [{"num_cpus": self.threads} for _ in STAGES[:-1]] + [{"num_cpus": 1}]
        crowd = max(1, -(-self.devices // self.gpus))
        encode = _OTHER_SHARE / max(1, -(-self.encoders // self.gpus))
        shares = (encode, _DENOISE_SHARE / crowd, _OTHER_SHARE / crowd, 0)
        return [{"num_cpus": 1, "num_gpus": share} for share in shares]

    def cpus(self) -> int:
        """CPUs that all workers reserve."""
        return int(sum(count * each["num_cpus"] for count, each in zip(self.workers(), self.resources(), strict=True)))

    def store_bytes(self) -> int:
        """How much the object store may hold between the stages."""
        return max(_LEAST_STORE_BYTES, self.devices * _STORE_BYTES)


def _task(rows: Rows) -> dict[str, Any]:
    return {"rows": json.dumps([row | {"seconds": 0.0, "span": (0, 0)} for row in rows]), "data": np.zeros(1, np.uint8)}


def here(tasks: Iterable[Rows], work: Work) -> Iterator[dict[str, Any]]:
    """One task after the other in this process. Yields finished rows."""
    stages = [stage(work) for stage in STAGES]
    for rows in tasks:
        task = _task(rows)
        for stage in stages:
            task = stage(task)
        yield from json.loads(task["rows"])


def _code(folder: Path) -> str:
    """A copy of this package's code in ``folder``, under its import name, whatever its own folder is called. Workers
    import it: nothing has to be installed on their machines, and all run the same version."""
    root, package = Path(__file__).absolute().parents[2], folder / __package__.partition(".")[0]
    for pattern in ("*.py", *(f"{part}/**/*.py" for part in ("loaders", "networks", "ops", "standalone"))):
        for file in root.glob(pattern):
            copy = package / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return str(package)


def start(address: str | None, pools: Pools) -> int:
    """Join the cluster at ``address``, or start Ray for this process alone, reachable from this machine only. Its GPUs.

    Raises ValueError where neither is possible.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # workers that die are this program's to report
    if not address:
        # What Ray does on Windows and macOS: its servers listen on 127.0.0.1, elsewhere on every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if found := libraries.problem(RAY):
        raise ValueError(found)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)

    local = {} if address else {"num_cpus": pools.cpus(), "num_gpus": pools.gpus, "include_dashboard": False,
                                "object_store_memory": 2 * pools.store_bytes()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            ray.init(address or "local", log_to_driver=False, logging_level="error",
                     runtime_env={"py_modules": [_code(Path(folder))]}, **local)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"no Ray at {address or 'this machine'}: {error}{_TOKEN if address else ''}") from error
    return int(ray.cluster_resources().get("GPU", 0))


def remotely(function: Callable[[Any], T], argument: Any, pools: Pools) -> T:
    """Call a function on a machine of the cluster that denoises."""
    import ray

    return ray.get(ray.remote(function).options(**pools.resources()[1]).remote(argument))


def on_ray(tasks: Iterable[Rows], work: Work, pools: Pools) -> Iterator[dict[str, Any]]:
    """The tasks through actor pools on the Ray that was started. Yields finished rows in the order they finish."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=pools.store_bytes())
    tasks = iter(tasks)
    while wave := list(itertools.islice(tasks, _WAVE)):
        # A block of its own for each task, so that a task is what is run again.
        data = ray.data.from_items([_task(rows) for rows in wave], override_num_blocks=len(wave))
        for stage, size, resources in zip(STAGES, pools.workers(), pools.resources(), strict=True):
            data = data.map(stage, fn_constructor_args=(work,), compute=ActorPoolStrategy(size=size), **resources)
        try:
            for task in data.iter_rows():
                yield from json.loads(task["rows"])
        except ray.exceptions.RayError as error:
            ray.shutdown()
            raise ValueError(f"Ray ended the run: {str(error).strip().splitlines()[-1]}") from error
    ray.shutdown()  # prints what it still has to say, so before the caller's stdout is itself again
