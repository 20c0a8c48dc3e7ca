"""``bonsai-image download``: one repository of PrismML from the Hugging Face Hub, verified, into the right folder.

Needs huggingface_hub only, so that any Python that has it can run it. Nothing else here uses the network.
"""

import argparse
import json
import os
from pathlib import Path, PureWindowsPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..disk import advice, patiently, reason, write_whole
from ..published import PARTIAL, RECORD, RELEASES, Release


class Refused(ValueError):
    """One sentence about what was not downloaded, or not wholly, and what to do."""


def _matches(file: Path, entry) -> bool:
    """Whether ``file`` is what the hub says it is: SHA-256 of a large file, git's SHA-1 of a small one."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        if entry.lfs is None:
            return git_hash(stream.read()) == entry.blob_id
        return sha_fileobj(stream).hex() == entry.lfs.sha256


def _inside(name: str) -> str:
    path = PureWindowsPath(name)  # treats / and \ as separators
    if path.anchor or ".." in path.parts:
        raise Refused(f"The hub names a file outside of the repository ({name}); nothing was downloaded.")
    return name


def _refuse_changed(repository: Release, commit: str, listed: dict) -> None:
    """Raise Refused where the hub lists a weight file with another size or hash than the one known at ``commit``.

    ``listed``: the hub's entries by name.
    """
    for file in repository.files if commit == repository.commit else ():
        entry = listed.get(file.path)
        if not entry or entry.size != file.size or file.sha256 not in (None, entry.lfs and entry.lfs.sha256):
            raise Refused(f"{file.path} of {repository.id} at {commit} is not the published file of {file.size:,} "
                             "bytes; nothing was downloaded.")


def download(repository: Release, revision: str | None, folder: Path) -> Path:
    """Fetch ``repository`` at ``revision`` (None: the one known here) into a new folder of its name in ``folder``, and
    return that.

    A broken connection is resumed where it stopped. After an interruption, whole files stay in ``<name>.partial`` and
    are not fetched again; the client library starts the others over. Raises :class:`Refused` where the target exists,
    the hub does not answer, a file is not what the hub or :mod:`..published` says it is, or anything else goes wrong.
    """
    revision = revision or repository.commit or "main"
    target = folder / repository.id.split("/")[1]
    partial = target.with_name(f"{target.name}{PARTIAL}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise Refused(f"{target} already exists; remove it, or choose another folder with --to.")
    except OSError as error:
        raise Refused(f"{folder} is not a writable folder ({reason(error)}); choose another with --to.") from error
    try:
        _fetch(repository, revision, partial)
        patiently(partial.rename, target)
    except (Refused, KeyboardInterrupt, SystemExit, ModuleNotFoundError):
        raise
    except RevisionNotFoundError as error:
        raise Refused(f"{repository.id} has no revision {revision}; use --revision main for the newest.") from error
    except BaseException as error:  # whatever the client's libraries raise; a panic of its Rust part is no Exception
        first = f"{todo} and " if (todo := advice(error, "")) else ""
        raise Refused(f"Downloading {repository.id} stopped ({reason(error)}); whole files are kept in {partial}, so "
                      f"{first}run the same command again to continue.") from error
    return target


def _fetch(repository: Release, revision: str, partial: Path) -> None:
    """Bring ``partial`` to hold exactly the files of the repository, and a record of where they came from."""
    info = HfApi().model_info(repository.id, revision=revision, files_metadata=True, token=False)
    listed = {_inside(entry.rfilename): entry for entry in info.siblings}
    _refuse_changed(repository, info.sha, listed)
    snapshot_download(repository.id, revision=info.sha, local_dir=partial, token=False)
    if damaged := [name for name, entry in listed.items() if not _matches(partial / name, entry)]:
        for name in damaged:
            patiently((partial / name).unlink, True)
        raise Refused(f"{', '.join(damaged)} arrived damaged and was removed; run the same command again to download "
                      "it again.")
    # Files of another revision, from an interrupted download of it; the client's own records stay.
    for file in list(partial.rglob("*")):
        name = file.relative_to(partial).as_posix()
        if file.is_file() and name not in listed and not name.startswith(".cache/"):
            patiently(file.unlink)
    record = {"repository": repository.id, "revision": revision, "commit": info.sha}
    write_whole(partial / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def main(argv: list[str]) -> int:
    """Run the command ``download`` with its options; 0 on success, 2 with one sentence on stderr.

    The default folder is ``models/diffusers`` of the ComfyUI in whose ``custom_nodes`` this is installed.
    """
    program = Path(__file__).absolute().parent.parent  # lexically: it may be a link in custom_nodes
    folder = program.parent.parent / "models" / "diffusers" if program.parent.name == "custom_nodes" else Path("models")
    parser = argparse.ArgumentParser("bonsai-image download", description="Download a repository of Bonsai Image 4B.")
    parser.add_argument("--variant", choices=("ternary", "binary"), required=True)
    parser.add_argument("--format", choices=("mlx", "gemlite"), default="mlx",
                        help="mlx (default) is safetensors and loads on every system; gemlite is a pickle")
    parser.add_argument("--to", type=Path, default=folder, help=f"folder to put it in (default: {folder})")
    parser.add_argument("--revision", help="branch, tag or commit; main is the newest (default: the one known here)")
    args = parser.parse_args(argv[1:])
    try:
        print(download(RELEASES[args.variant, args.format], args.revision, args.to))
    except Refused as error:
        parser.exit(2, f"bonsai-image: {error}\n")
    return 0
