"""bonsai-image download against a local hub: what arrives, what is refused, resuming, damage."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest

from bonsai_image.published import RELEASES

ROOT = Path(__file__).parent.parent
NAME = "bonsai-image-ternary-4B-mlx-2bit"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"model_index.json": b'{"_class_name": "Flux2KleinPipeline"}\n',
         "transformer-packed-mflux/diffusion_pytorch_model.safetensors": os.urandom(16_000_000)}
LARGE = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """The routes that a download uses. ``cut`` ends the next large transfer there; ``served`` overrides contents;
    ``extra`` are names that only the first list has."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.served, self.extra = None, dict(FILES), []
        self.ranges, self.tokens, self.paths, self.fetched = [], [], [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.paths.append(self.path)
        self.server.tokens.append(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/prism-ml/{NAME}/revision/") and path.split("/")[-1] not in ("main", COMMIT):
            return self.answer(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        if path.startswith(f"/api/models/prism-ml/{NAME}/revision/"):
            return self.answer(json.dumps(self.description()).encode(), {"Content-Type": "application/json"})
        if path.startswith(f"/api/models/prism-ml/{NAME}/tree/"):
            return self.answer(json.dumps(self.tree()).encode(), {"Content-Type": "application/json"})
        marker = f"/prism-ml/{NAME}/resolve/{COMMIT}/"
        if path.startswith(marker) and path.removeprefix(marker) in FILES:
            return self.file(path.removeprefix(marker))
        return self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def entry(self, name: str) -> dict:
        content = FILES.get(name, b"")
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"size": len(content), "blobId": sha1, **({"lfs": lfs} if name == LARGE else {})}

    def description(self) -> dict:
        names = [*FILES, *self.server.extra]
        self.server.extra = []
        return {"_id": "1", "id": f"prism-ml/{NAME}", "modelId": f"prism-ml/{NAME}", "sha": COMMIT, "private": False,
                "tags": [], "downloads": 0, "siblings": [{"rfilename": name, **self.entry(name)} for name in names]}

    def tree(self) -> list[dict]:
        return [{"type": "file", "path": name, "oid": self.entry(name)["blobId"], "size": len(content),
                 **({"lfs": {**self.entry(name)["lfs"], "oid": self.entry(name)["lfs"]["sha256"]}}
                    if name == LARGE else {})} for name, content in FILES.items()]

    def file(self, name: str) -> None:
        content, etag = self.server.served[name], self.entry(name)["blobId"]
        if name == LARGE:
            etag = self.entry(name)["lfs"]["sha256"]
        if self.command == "GET":
            self.server.fetched.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = 0
        if self.headers.get("Range") and self.command == "GET":
            self.server.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(content[start:], headers, 206 if start else 200, self.server.cut if name == LARGE else None)

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None


@pytest.fixture
def hub():
    server = Hub()
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
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5",
                   "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return subprocess.run([sys.executable, *command, "download", "--variant", "ternary",
                           *(["--revision", revision] if revision else []), *words], cwd=home,
                          capture_output=True, text=True, env=environment, timeout=240)


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
