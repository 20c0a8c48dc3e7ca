"""What ComfyUI's registry gets, by its own command line (comfy-cli).

It asks nothing, sends nothing and needs no network for this; its settings go into a folder that is thrown away.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMFY = shutil.which("comfy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
pytestmark = pytest.mark.skipif(COMFY is None, reason="no comfy beside this Python (pip install comfy-cli)")
#: Everything at the top of the archive; the rest of the repository stays out.
WANTED = {"__init__.py", "__main__.py", "disk.py", "published.py", "loaders", "networks", "nodes", "ops", "standalone",
          "web", "locales", "example_workflows", "subgraphs", "pyproject.toml", "requirements.txt", "README.md",
          "LICENSE", "NOTICE", "CHANGELOG.md"}


def comfy(folder: Path, *words: str) -> str:
    home = {name: str(folder.parent / "home") for name in ("HOME", "USERPROFILE", "APPDATA", "XDG_CONFIG_HOME")}
    done = subprocess.run([COMFY, "--skip-prompt", "node", *words], cwd=folder, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=os.environ | home | {"DO_NOT_TRACK": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def clone(tmp_path) -> Path:
    """The tracked files as they are now, in a repository of their own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    for words in (("init", "-q"), ("add", "-A")):
        subprocess.run(["git", *words], cwd=tmp_path / "clone", check=True)
    return tmp_path / "clone"


def test_comfy_node_validate_passes(clone):
    said = comfy(clone, "validate")
    assert "passed" in said and "warning" not in said.lower()


def test_archive_contents(clone):
    comfy(clone, "pack")
    with zipfile.ZipFile(clone / "node.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == WANTED
        help_pages = [Path(name) for name in archive.namelist() if name.startswith("web/docs/")]
        assert {path.suffix for path in help_pages} == {".md", ".jpg"} and len({p.stem for p in help_pages}) == 5
