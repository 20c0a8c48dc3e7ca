"""``bonsai-image download``: one repository of PrismML from the Hugging Face Hub, verified, into the right folder.

Needs huggingface_hub only, so that any Python that has it can run it. Nothing else in the pack uses the network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path, PureWindowsPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

_REPOSITORIES = {
    ("ternary", "mlx"): "prism-ml/bonsai-image-ternary-4B-mlx-2bit",
    ("binary", "mlx"): "prism-ml/bonsai-image-binary-4B-mlx-1bit",
    ("ternary", "gemlite"): "prism-ml/bonsai-image-ternary-4B-gemlite-2bit",
    ("binary", "gemlite"): "prism-ml/bonsai-image-binary-4B-gemlite-1bit",
}
#: What the library below the hub's client raises: it has changed twice, and the client's own error derives from it.
_TRANSPORT_ERRORS = (*HfHubHTTPError.__bases__, OSError)
#: Beside the weights: where they came from.
RECORD = "bonsai-download.json"
_CHUNK = 1 << 22


def default_folder(pack: Path) -> Path:
    """``models/diffusers`` of the ComfyUI in whose ``custom_nodes`` the folder ``pack`` lies, else ``./models``."""
    # By the letters of the path: the folder may be a link to somewhere else.
    if pack.parent.name == "custom_nodes":
        return pack.parent.parent / "models" / "diffusers"
    return Path("models")


def _digest(file: Path, algorithm: str, prefix: bytes = b"") -> str:
    state = hashlib.new(algorithm, prefix, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _matches(file: Path, entry) -> bool:
    """Whether ``file`` is what the hub says it is: SHA-256 of a large file, git's SHA-1 of a small one."""
    if not file.is_file():
        return False
    if entry.lfs is not None:
        return _digest(file, "sha256") == entry.lfs.sha256
    return _digest(file, "sha1", b"blob %d\0" % file.stat().st_size) == entry.blob_id


def _inside(name: str) -> str:
    path = PureWindowsPath(name)  # which knows both kinds of slashes
    if path.anchor or ".." in path.parts:
        raise ValueError(f"The hub names a file outside of the repository ({name}); nothing was downloaded.")
    return name


def _leftovers(folder: Path, names: set[str]) -> list[Path]:
    """Files that another revision had, from a download that was interrupted; the client's own notes stay."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return [path for name, path in files.items() if name not in names and not name.startswith(".cache/")]


def download(repository: str, revision: str, folder: Path) -> Path:
    """Fetch ``repository`` at ``revision`` into a new folder of its own name under ``folder``, and return that.

    A broken connection is taken up again where it stopped. After an interruption the files that are whole stay in
    ``<name>.partial`` and are not fetched again; the client library begins the others anew. Raises ValueError in one
    sentence where the target exists, the hub does not answer, or a file is not what the hub says it is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} is no folder to write to ({error.strerror}); choose another with --to.") from error
    target = folder / repository.split("/")[1]
    partial = target.with_name(f"{target.name}.partial")
    if target.exists():
        raise ValueError(f"{target} exists and is left as it is; remove it or choose another folder with --to.")
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, token=False)
        names = {_inside(entry.rfilename) for entry in info.siblings}
        snapshot_download(repository, revision=info.sha, local_dir=partial, token=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, *_TRANSPORT_ERRORS) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"Downloading {repository} stopped ({reason}); whole files are kept, so run the same "
                         "command again to go on.") from error
    damaged = [entry.rfilename for entry in info.siblings if not _matches(partial / entry.rfilename, entry)]
    if damaged:
        for name in damaged:
            (partial / name).unlink(missing_ok=True)
        raise ValueError(f"{', '.join(damaged)} arrived damaged and was removed; run the same command again to fetch "
                         "it anew.")
    for leftover in _leftovers(partial, names):
        leftover.unlink()
    record = {"repository": repository, "revision": revision, "commit": info.sha}
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.rename(target)
    return target


def main(argv: list[str]) -> int:
    """Run the command; 0 on success, 2 with one sentence on stderr."""
    folder = default_folder(Path(__file__).absolute().parent.parent)
    parser = argparse.ArgumentParser(prog="bonsai-image download", description="Download a Bonsai Image 4B pack.")
    parser.add_argument("--variant", choices=("ternary", "binary"), required=True)
    parser.add_argument("--format", choices=("mlx", "gemlite"), default="mlx",
                        help="mlx (default) is safetensors and loads on every system; gemlite is a pickle")
    parser.add_argument("--to", type=Path, default=folder, help=f"folder to put it in (default: {folder})")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default: main)")
    args = parser.parse_args(argv)
    try:
        print(download(_REPOSITORIES[args.variant, args.format], args.revision, args.to))
    except ValueError as error:
        print(f"bonsai-image: {error}", file=sys.stderr)
        return 2
    return 0
