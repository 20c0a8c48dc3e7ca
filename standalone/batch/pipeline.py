"""Tasks through the four stages: in this process, or as a Ray Data pipeline of actor pools.

Ray Data does what a queue of our own would have to: it reruns a task whose worker died, recomputes an object that was
lost with its machine, and makes a stage wait for a slower one behind it.
"""

import itertools
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ops.backends import libraries
from ...ops.devices import default_dtype
from .stages import STAGES, Record, Stage, Work, received, sent

RAY = libraries.Library("ray", "ray.data", "2.50", "pip install --upgrade 'ray[data]'",
                        "pip install --force-reinstall 'ray[data]'")

#: Tasks that Ray Data is handed at a time, which bounds what the driver keeps of them.
_WAVE = 20_000
#: Shares of a GPU: a half for all that denoise on it, a quarter for an encoder and a decoder. One divides the other,
#: so that they fill GPUs without a gap.
_DENOISE_SHARE, _OTHER_SHARE = 0.5, 0.25
#: Bytes of the object store, between all stages, for each worker that denoises, and at least.
_STORE_BYTES, _LEAST_STORE_BYTES = 256 << 20, 512 << 20

#: What may be missing where a cluster refuses to be joined.
_TOKEN = ("; if it runs and authenticates, as ray start --head makes it, copy ~/.ray/auth_token from its first machine "
          "and set RAY_AUTH_MODE=token")


@dataclass(frozen=True)
class Pools:
    """Workers of each stage; ``gpus`` is how many GPUs they share, 0 to run on CPUs with ``threads`` each."""

    encoders: int
    devices: int
    gpus: int
    threads: int

    def stages(self) -> list[tuple[type[Stage], int, dict[str, float]]]:
        """Each stage, how many workers it has (as many decode and write as denoise), and what Ray reserves for one."""
        workers = self.encoders, self.devices, self.devices, max(1, self.devices // 4)
        reserved: list[dict[str, float]] = [{"num_cpus": cpus} for cpus in (*[self.threads] * 3, 1)]
        if self.gpus:
            crowd = max(1, -(-self.devices // self.gpus))
            encode = _OTHER_SHARE / max(1, -(-self.encoders // self.gpus))
            reserved = [{"num_cpus": 1, "num_gpus": share}
                        for share in (encode, _DENOISE_SHARE / crowd, _OTHER_SHARE / crowd, 0)]
        return list(zip(STAGES, workers, reserved, strict=True))

    def store_bytes(self) -> int:
        """How much the object store may hold between the stages."""
        return max(_LEAST_STORE_BYTES, self.devices * _STORE_BYTES)


def here(tasks: Iterable[list[Record]], work: Work) -> Iterator[Record]:
    """One task after the other in this process. Yields finished rows."""
    stages = [stage(work) for stage in STAGES]
    for rows in tasks:
        for stage in stages:
            stage.advance(rows)
        yield from rows


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
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # this program reports workers that die
    if not address:
        # As on Windows and macOS: Ray's servers then listen on 127.0.0.1, not on every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if found := libraries.problem(RAY):
        raise ValueError(found)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)

    cpus = int(sum(workers * each["num_cpus"] for _, workers, each in pools.stages()))
    local = {} if address else {"num_cpus": cpus, "num_gpus": pools.gpus, "include_dashboard": False,
                                "object_store_memory": 2 * pools.store_bytes()}
    try:
        if at := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or ""):
            socket.create_connection((at[1], int(at[2])), 10).close()  # where nobody listens, Ray tries for minutes
        with tempfile.TemporaryDirectory() as folder:
            ray.init(address or "local", log_to_driver=False, logging_level="error",
                     runtime_env={"py_modules": [_code(Path(folder))]}, **local)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"no Ray at {address or 'this machine'}: {error}{_TOKEN if address else ''}") from error
    return int(ray.cluster_resources().get("GPU", 0))


def default_dtype_there(device: torch.device, pools: Pools) -> torch.dtype:
    """:func:`default_dtype` of a machine of the cluster that denoises."""
    import ray

    _, _, reserved = pools.stages()[1]
    return ray.get(ray.remote(default_dtype).options(**reserved).remote(device))


def on_ray(tasks: Iterable[list[Record]], work: Work, pools: Pools) -> Iterator[Record]:
    """The tasks through actor pools on the Ray that was started. Yields finished rows in the order they finish."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=pools.store_bytes())
    tasks = iter(tasks)
    while wave := list(itertools.islice(tasks, _WAVE)):
        # One block per task, so that a retry repeats one task.
        data = ray.data.from_items([sent(rows) for rows in wave], override_num_blocks=len(wave))
        for stage, workers, reserved in pools.stages():
            data = data.map(stage, fn_constructor_args=(work,), compute=ActorPoolStrategy(size=workers), **reserved)
        try:
            for task in data.iter_rows():
                yield from received(task)
        except ray.exceptions.RayError as error:
            ray.shutdown()
            raise ValueError(f"Ray ended the run: {str(error).strip().splitlines()[-1]}") from error
    ray.shutdown()  # prints its last messages, so while the caller still redirects stdout
