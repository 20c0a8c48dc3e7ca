"""bonsai-image download against a local hub: what arrives, what is refused, resuming, damage."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from bonsai_image.published import RELEASES
from bonsai_image.tests.support.hub import COMMIT, Hub

ROOT = Path(__file__).parent.parent
NAME = "bonsai-image-ternary-4B-mlx-2bit"
FILES = {"model_index.json": b'{"_class_name": "Flux2KleinPipeline"}\n',
         "transformer-packed-mflux/diffusion_pytorch_model.safetensors": os.urandom(16_000_000)}
LARGE = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub():
    server = Hub(NAME, FILES)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


#: Runs the command as if COMMIT, with one file, by its name, size and SHA-256 or "", were the published one.
PUBLISHED = f"""
import sys
from bonsai_image import published
from bonsai_image.__main__ import main
name, size, sha256 = sys.argv[-3:]
files = (published.File(name, int(size), sha256 or None),)
published.RELEASES["ternary", "mlx"] = published.Release("prism-ml/{NAME}", {COMMIT!r}, files)
del sys.argv[-3:]
sys.exit(main())
"""


def run(hub: Hub, *words: str, home: Path, command: tuple[str, ...] = ("-m", "bonsai_image"), revision="main"):
    return subprocess.run([sys.executable, *command, "download", "--variant", "ternary",
                           *(["--revision", revision] if revision else []), *words], cwd=home,
                          capture_output=True, text=True, env=hub.environment(home), timeout=240)


def arrived(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_repository_arrives_whole_without_an_account(hub, tmp_path):
    done = run(hub, "--to", str(tmp_path / "models"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / NAME
    assert done.stdout.strip().endswith(str(folder)) and arrived(folder) == FILES
    record = json.loads((folder / "bonsai-download.json").read_text())
    assert record == {"repository": f"prism-ml/{NAME}", "revision": "main", "commit": COMMIT}
    assert not any(hub.tokens), "no token is sent even where one is set"
    assert "%" in done.stderr, "a progress bar"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]
    assert any(path.is_file() for path in (folder / ".cache").rglob("*")), "the client's own records"
    branch = [path for path in hub.paths if path.split("?")[0].endswith("/revision/main")]
    assert len(branch) == 1, "a branch that moves meanwhile gives files of one commit"


@pytest.mark.parametrize("sha256", [hashlib.sha256(FILES[LARGE]).hexdigest(), ""], ids=["hash", "no hash"])
def test_by_default_it_takes_the_published_revision(hub, tmp_path, sha256):
    done = run(hub, home=tmp_path, revision=None)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"has no revision {RELEASES['ternary', 'mlx'].commit}; use --revision main" in done.stderr
    done = run(hub, LARGE, "16000000", sha256, home=tmp_path, command=("-c", PUBLISHED), revision=None)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "models" / NAME / "bonsai-download.json").read_text())
    assert record["revision"] == record["commit"] == COMMIT


@pytest.mark.parametrize(("name", "size", "sha256"), [
    (LARGE, "16000001", hashlib.sha256(FILES[LARGE]).hexdigest()), (LARGE, "16000000", "0" * 64),
    ("vae/gone.safetensors", "16000000", "")], ids=["size", "hash", "gone"])
def test_another_file_than_the_published_one_is_not_fetched(hub, tmp_path, name, size, sha256):
    done = run(hub, name, size, sha256, home=tmp_path, command=("-c", PUBLISHED), revision=None)
    assert done.returncode == 2 and f"{name} of prism-ml/{NAME} at {COMMIT} is not the published file" in done.stderr
    assert not hub.fetched


def test_an_existing_folder_is_left_alone(hub, tmp_path):
    (tmp_path / "models" / NAME).mkdir(parents=True)
    done = run(hub, home=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "exists" in done.stderr
    assert not hub.paths and not list((tmp_path / "models" / NAME).iterdir())


def test_a_broken_connection_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut = 12_000_000  # the client writes in pieces of 10 MB
    assert run(hub, home=tmp_path).returncode == 0
    assert hub.ranges and all(int(entry.removeprefix("bytes=").split("-")[0]) > 0 for entry in hub.ranges)
    assert arrived(tmp_path / "models" / NAME) == FILES


def test_after_an_interruption_only_what_is_missing_is_fetched(hub, tmp_path):
    hub.cut = 1_000_000
    broken = run(hub, home=tmp_path)
    assert broken.returncode == 2 and "run the same command again" in broken.stderr.splitlines()[-1]
    assert not (tmp_path / "models" / NAME).exists()
    hub.cut, hub.fetched = None, []
    assert run(hub, home=tmp_path).returncode == 0
    assert arrived(tmp_path / "models" / NAME) == FILES and hub.fetched == [LARGE]


def test_what_an_older_revision_left_is_not_part_of_the_repository(hub, tmp_path):
    partial = tmp_path / "models" / f"{NAME}.partial"
    partial.mkdir(parents=True)
    (partial / "older.safetensors").touch()
    assert run(hub, home=tmp_path).returncode == 0
    folder = tmp_path / "models" / NAME
    assert arrived(folder) == FILES and not (folder / "older.safetensors").exists()


@pytest.mark.parametrize("name", ["../victim.txt", "/victim.txt", "a\\..\\..\\victim.txt", "C:\\victim.txt"])
def test_a_hub_that_names_files_elsewhere_is_refused(name):
    from bonsai_image.standalone.download import _inside

    with pytest.raises(ValueError, match="outside of the repository"):
        _inside(name)
    assert _inside("vae/config.json") == "vae/config.json"


def test_such_a_hub_is_not_fetched_from(hub, tmp_path):
    hub.extra = ["../victim.txt"]
    done = run(hub, home=tmp_path)
    assert done.returncode == 2 and "outside of the repository (../victim.txt)" in done.stderr and not hub.fetched


def test_a_file_that_did_not_arrive_is_damaged(hub, tmp_path):
    hub.extra = ["vae/gone.json"]
    done = run(hub, home=tmp_path)
    assert done.returncode == 2 and "bonsai-image: vae/gone.json arrived damaged" in done.stderr.splitlines()[-1]


def test_an_error_without_a_message_is_named(tmp_path, monkeypatch):
    from bonsai_image.standalone import download

    monkeypatch.setattr(download.HfApi, "model_info", Mock(side_effect=TimeoutError))
    with pytest.raises(ValueError, match=r"stopped \(TimeoutError\); whole files are kept"):
        download.download(RELEASES["ternary", "mlx"], None, tmp_path)


def test_a_target_that_is_no_folder_is_said_before_the_network_is_used(hub, tmp_path):
    (tmp_path / "file").touch()
    done = run(hub, "--to", str(tmp_path / "file"), home=tmp_path)
    assert done.returncode == 2 and "choose another with --to" in done.stderr and not hub.paths


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_fetched_anew(hub, tmp_path, name):
    damaged = bytearray(FILES[name])
    damaged[-1] ^= 1
    hub.served[name] = bytes(damaged)
    done = run(hub, home=tmp_path)
    assert done.returncode == 2 and name in done.stderr.splitlines()[-1] and "damaged" in done.stderr
    assert not (tmp_path / "models" / NAME).exists()
    hub.served[name] = FILES[name]
    assert run(hub, home=tmp_path).returncode == 0
    assert arrived(tmp_path / "models" / NAME) == FILES


def test_an_unknown_repository_is_one_sentence(hub, tmp_path):
    done = run(hub, "--format", "gemlite", home=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "gemlite" in done.stderr


@pytest.mark.parametrize("script", ["__main__.py", ""], ids=["file", "folder"])
def test_by_its_path_in_custom_nodes_it_fills_that_comfyui(hub, tmp_path, script):
    """As a Manager installs it: a folder of any name, nothing pip-installed."""
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "Bonsai-Clone"
    pack.parent.mkdir(parents=True)
    pack.symlink_to(ROOT, target_is_directory=True)
    done = run(hub, home=tmp_path, command=("-I", str(pack / script)))
    assert done.returncode == 0, done.stderr
    assert arrived(tmp_path / "ComfyUI" / "models" / "diffusers" / NAME) == FILES


def test_it_imports_neither_torch_nor_diffusers():
    code = ("import sys; sys.argv = ['x', 'download', '--help']\nfrom bonsai_image.__main__ import main\n"
            "try: main()\nexcept SystemExit: pass\nprint({'torch', 'diffusers', 'transformers'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")
