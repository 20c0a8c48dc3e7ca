"""``inspect`` over full-size replicas of the published repositories: ``pytest -m full_size -s``. Needs 8 GB of disk."""

import json
import subprocess
import sys
import time

import pytest

from bonsai_image.published import RELEASES
from bonsai_image.tests.support import published_files

CODE = """
import sys
from pathlib import Path
from bonsai_image.__main__ import main
status = main()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""

WRITERS = {
    ("ternary", "mlx"): lambda path: published_files.write_mlx(path, 2),
    ("binary", "mlx"): lambda path: published_files.write_mlx(path, 1),
    ("ternary", "gemlite"): lambda path: published_files.write_gemlite(path, 2),
    ("binary", "gemlite"): lambda path: published_files.write_gemlite(path, 1),
    ("ternary", "unpacked"): published_files.write_unpacked,
}


@pytest.mark.full_size
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("variant", "kind"), WRITERS, ids=[f"{variant}-{kind}" for variant, kind in WRITERS])
def test_inspect_has_no_complaint(variant, kind, tmp_path):
    repository = RELEASES[variant, kind]
    path = WRITERS[variant, kind](tmp_path / repository.id)
    for file in repository.files:
        assert (path / file.path).stat().st_size == file.size, file.path
    if kind == "unpacked":
        shards = sorted((path / "text_encoder").glob("*.safetensors"))
        assert [shard.stat().st_size for shard in shards] == [4967215360, 3077766632]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CODE, "inspect", path, "--json"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)
    assert [part["kind"] for part in parts] == ["diffusion model", "text encoder", "VAE"]
    assert not any(part["problems"] or part["warnings"] for part in parts)
    assert parts[0]["packed_layers"] == 100 and parts[0]["packed_weights"] == 3_680_501_760
    if kind != "unpacked":  # zeros fit both alphabets
        assert parts[0]["variant"] == variant
    assert all(any("as long as the published file" in text for text in part["published"])
               for part in parts if kind == "mlx" or part["kind"] == "VAE")
    print(f"\n{repository.id}: {seconds:.1f} s, {done.stderr.strip().splitlines()[-1]}")
