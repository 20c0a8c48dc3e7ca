"""``bonsai-image batch`` on a cluster of three raylets that has nothing of ours installed, with authentication on."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import psutil
import pytest
import ray
from ray.util import get_node_ip_address

from bonsai_image.standalone.batch import pipeline, stages
from bonsai_image.tests.support.batch_runs import COMMON, assert_whole, batch, finished, images, write_prompts

ROOT = Path(__file__).parents[1]
CODE = ("*.py", "loaders", "networks", "ops", "standalone")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The pack as cloned into ``custom_nodes``, with a model in it."""
    folder = tmp_path / "bonsai image-1.0"
    folder.mkdir()
    for source in (path for pattern in CODE for path in ROOT.glob(pattern)):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name)
    (folder / "model.safetensors").write_bytes(bytes(1_000_000))
    return folder


def test_workers_get_the_code_and_nothing_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "__file__", str(folder / "standalone" / "batch" / "pipeline.py"))
    found = Path(pipeline._code(tmp_path / "sent"))
    files = [path for path in found.rglob("*") if path.is_file()]
    assert found.name == "bonsai_image" and {path.suffix for path in files} == {".py"}
    done = subprocess.run([sys.executable, "-c", "import bonsai_image.loaders.errors as e; print(e.__file__)"],
                          cwd=found.parent, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == found / "loaders" / "errors.py"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "no-such-machine.invalid:6379",
                                     "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_said_at_once(address, monkeypatch):
    """Ray would try it for minutes."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("asked Ray"))
    with pytest.raises(ValueError, match=rf"^no Ray at {re.escape(address)}: .*auth_token"):
        pipeline.start(address, pipeline.Pools(1, 1, 0, 1))


class Cluster:
    """Machines are process groups here: each has a home with the token, and an empty folder."""

    def __init__(self, python: Path):
        # A short path: sockets lie below it.
        self.python, self.folder = python, Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.machines, self.token = [], secrets.token_hex(32)

    def environment(self, name: str, token: str | None) -> dict[str, str]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        known = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
        if token is None:
            return known | {"HOME": str(home)}
        (home / ".ray").mkdir(exist_ok=True)
        (home / ".ray" / "auth_token").write_text(token)
        return known | {"HOME": str(home), "RAY_AUTH_MODE": "token"}

    def start(self, *words: str) -> psutil.Process:
        """Returns once the machine has joined, since two that start at once may choose the same ports."""
        name = f"machine{len(self.machines)}"
        environment = self.environment(name, self.token)
        self.machines.append(psutil.Process(subprocess.Popen(
            [self.python, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=3", "--disable-usage-stats",
             "--object-store-memory=200000000", *words], cwd=self.folder / name,
            env=environment, stdout=(log := self.folder / f"{name}.log").open("w"), stderr=subprocess.STDOUT).pid))
        while "Ray runtime started" not in log.read_text():
            assert self.machines[-1].status() != psutil.STATUS_ZOMBIE, log.read_text()
            time.sleep(0.2)
        return self.machines[-1]

    def end(self, machine: psutil.Process) -> None:
        for each in [*machine.children(recursive=True), machine]:
            if each.is_running():
                each.kill()


@pytest.fixture
def cluster(tmp_path):
    """Its Python has what ours has installed, but for what is installed as editable: this package."""
    venv.create(tmp_path / "python", symlinks=True)
    (site,) = (tmp_path / "python").glob("lib/*/site-packages")
    site.joinpath("all.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    cluster = Cluster(tmp_path / "python" / "bin" / "python")
    assert subprocess.run([cluster.python, "-c", "import bonsai_image"], cwd=tmp_path, capture_output=True).returncode
    yield cluster
    for machine in cluster.machines:
        if machine.is_running():
            cluster.end(machine)
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray has clusters on Linux only")
def test_a_cluster_with_nothing_installed_makes_the_images_though_a_machine_dies(cluster, folder, tmp_path):
    prompts, out, address = write_prompts(tmp_path), tmp_path / "b", f"{get_node_ip_address()}:6401"
    head = cluster.start("--head", "--port=6401", f"--temp-dir={cluster.folder / 'ray'}",
                         "--include-dashboard=false")
    assert batch(prompts, tmp_path / "a", "--seeds", 100) == 0
    for _ in range(2):
        cluster.start(f"--address={address}")

    def driver(token: str | None) -> subprocess.Popen:
        words = [cluster.python, folder, "batch", prompts, "--out", out, *COMMON, "--json", "--rows-per-task", 4,
                 "--seeds", 100, "--devices", 2, "--address", address]
        return subprocess.Popen(list(map(str, words)), cwd=tmp_path, env=cluster.environment("driver", token),
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    refused = driver(None)
    assert "copy ~/.ray/auth_token from its first machine" in refused.communicate(timeout=200)[1]
    assert refused.returncode == 2
    process = driver(cluster.token)
    while len(images(out)) < 60 and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()
    busy = [machine for machine in cluster.machines if machine is not head and any(
        stage.__name__ in " ".join(child.cmdline()) for child in machine.children(recursive=True)
        for stage in stages.STAGES)]
    cluster.end(busy[0])
    made = len(images(out))
    events = finished(process)
    assert made < 200 and events[-1] == {"event": "end", "made": 200, "failed": 0}
    assert_whole(out, tmp_path / "a", 200)
