"""A stand-in for the Hugging Face Hub on this machine: the routes that a download uses."""

import functools
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: Of every repository, the only commit.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: How a name ends that the Hub keeps by its SHA-256.
LARGE = ".safetensors"


class Hub(ThreadingHTTPServer):
    """One repository of prism-ml. ``cut`` ends the next large transfer there; ``served`` overrides contents; ``extra``
    are names that only the first list has."""

    def __init__(self, name: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.files = name, files
        self.cut, self.served, self.extra = None, dict(files), []
        self.ranges, self.tokens, self.paths, self.fetched = [], [], [], []
        self.entry = functools.cache(self._entry)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """That of a user whose client finds this one, keeps its own records in ``home`` and has a token."""
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5",
                "HF_HUB_DOWNLOAD_TIMEOUT": "5"}

    def _entry(self, name: str) -> dict:
        content = self.files.get(name, b"")
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"size": len(content), "blobId": sha1, **({"lfs": lfs} if name.endswith(LARGE) else {})}

    def description(self) -> dict:
        names = [*self.files, *self.extra]
        self.extra = []
        return {"_id": "1", "id": f"prism-ml/{self.name}", "modelId": f"prism-ml/{self.name}", "sha": COMMIT,
                "private": False, "tags": [], "downloads": 0,
                "siblings": [{"rfilename": name, **self.entry(name)} for name in names]}

    def tree(self) -> list[dict]:
        return [{"type": "file", "path": name, "oid": self.entry(name)["blobId"], "size": len(content),
                 **({"lfs": {**self.entry(name)["lfs"], "oid": self.entry(name)["lfs"]["sha256"]}}
                    if name.endswith(LARGE) else {})} for name, content in self.files.items()]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.paths.append(self.path)
        hub.tokens.append(self.headers.get("Authorization"))
        about = f"/api/models/prism-ml/{hub.name}"
        if path.startswith(f"{about}/revision/") and path.split("/")[-1] not in ("main", COMMIT):
            return self.answer(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        if path.startswith(f"{about}/revision/"):
            return self.answer(json.dumps(hub.description()).encode(), {"Content-Type": "application/json"})
        if path.startswith(f"{about}/tree/"):
            return self.answer(json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
        marker = f"/prism-ml/{hub.name}/resolve/{COMMIT}/"
        if path.startswith(marker) and path.removeprefix(marker) in hub.files:
            return self.file(path.removeprefix(marker))
        return self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def file(self, name: str) -> None:
        hub, entry = self.server, self.server.entry(name)
        content, large = hub.served[name], name.endswith(LARGE)
        if self.command == "GET":
            hub.fetched.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["lfs"]["sha256"] if large else entry["blobId"]}"',
                   "Accept-Ranges": "bytes"}
        start = 0
        if self.headers.get("Range") and self.command == "GET":
            hub.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(content[start:], headers, 206 if start else 200, hub.cut if large else None)

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None
