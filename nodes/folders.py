"""What the lists of the loaders show, and how to download what they lack."""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import folder_paths

from ..loaders import ModelFileError
from ..loaders.files import SAFETENSORS_SUFFIXES, locate
from ..loaders.repository import repositories_in
from ..published import PARTIAL, RELEASES, SINGLE_FILES

#: Bytes of the longest header that is read. ComfyUI puts whole workflows into them.
_LONGEST_HEADER = 1 << 24


def file_choices(kind: str, more_suffixes: Collection[str] = ()) -> list[str]:
    """Model files of a ComfyUI folder kind, and the folders that hold them, relative to their root; before anything is
    there :func:`_published`. Neither dotfiles, which macOS leaves beside copied files, nor unfinished downloads.

    ``more_suffixes`` are listed besides those of the files that ComfyUI itself can read.
    """
    return [*_files_and_folders(kind, tuple(more_suffixes), _walked(kind))] or _published(kind)


def _published(kind: str) -> list[str]:
    """What an empty list offers, so that *Run* says how to get it. Without endings: the frontend offers a file for
    download only where no list has it."""
    return [Path(name).stem for name in SINGLE_FILES[kind]]


def checkpoint_choices() -> list[str]:
    """Folders under ``models/diffusers``, one or two levels deep, that look like a downloaded repository, and single
    files under ``models/checkpoints`` that hold packed FLUX.2 weights; or before anything is there :func:`_published`,
    whose names are those of the repositories."""
    folders = _repositories(tuple(folder_paths.get_folder_paths("diffusers")), _walked("diffusers"))
    files = folder_paths.get_filename_list("checkpoints")
    return [*folders, *(name for name in files if name.endswith(SAFETENSORS_SUFFIXES)
                        and _is_packed(folder_paths.get_full_path("checkpoints", name)))
            ] or _published("diffusion_models")


def _is_packed(path: str | None) -> bool:
    """Whether the header of a safetensors file names layers of FLUX.2 and tags of packed ones; not if it is gone."""
    with contextlib.suppress(OSError):
        return path is not None and _header_is_packed(path, os.stat(path).st_mtime_ns)
    return False


@functools.lru_cache(maxsize=1024)
def _header_is_packed(path: str, _changed: int) -> bool:
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER))
    return b".double_stream_modulation_img." in header and b".comfy_quant" in header


def _walked(kind: str) -> float:
    """When ComfyUI last walked the folders of ``kind``: it does so again only after one of them has changed.

    Each answer stands for a state of the folders, so the lists below are made once for each.
    """
    folder_paths.get_filename_list(kind)
    return folder_paths.filename_list_cache[kind][2]


@functools.lru_cache(maxsize=8)
def _files_and_folders(kind: str, more_suffixes: tuple[str, ...], _walked: float) -> tuple[str, ...]:
    files = set(folder_paths.get_filename_list(kind))
    for root in folder_paths.get_folder_paths(kind) if more_suffixes else ():
        found, _ = folder_paths.recursive_search(root, [".git"])
        files.update(folder_paths.filter_files_extensions(found, more_suffixes))
    files = {file for file in files
             if not any(part.startswith(".") or part.endswith(PARTIAL) for part in Path(file).parts)}
    folders = {Path(file).parent.as_posix() for file in files} - {"."}
    return tuple(sorted([*files, *folders]))


@functools.lru_cache(maxsize=8)
def _repositories(roots: tuple[str, ...], _walked: float) -> tuple[str, ...]:
    found = {path.relative_to(root).as_posix() for root in roots for path in repositories_in(Path(root))}
    return tuple(sorted(found))


def resolve_checkpoint(name: str) -> str:
    """The path of one of :func:`checkpoint_choices`. Raises ModelFileError if it is gone."""
    return resolve("checkpoints" if name.endswith(SAFETENSORS_SUFFIXES) else "diffusers", name)


def resolve(kind: str, name: str) -> str:
    """The path of a choice. Raises ModelFileError if it is gone."""
    # Lexically, without resolving links: what a user has linked into the folder may lie anywhere.
    slashed = Path(name.replace("\\", "/"))
    inside = not slashed.anchor and ".." not in slashed.parts
    for root in map(Path, folder_paths.get_folder_paths(kind)):
        if inside and os.path.exists(found := locate(root, name)):
            return str(found)
    files = SINGLE_FILES.get(kind, {})
    address = next((files[file] for file in (name, f"{name}.safetensors") if file in files), None)
    action = (how_to_download(name) if kind == "diffusers" else
              f"download {address} as {name.removesuffix('.safetensors')}.safetensors into "
              f"{folder_paths.get_folder_paths(kind)[0]}, and press R" if address else
              "put it there and press R to refresh the list")
    raise ModelFileError(name, f"a file or folder under models/{kind}", "nothing of that name", action)


def how_to_download(name: str) -> str:
    """The command that downloads the repository ``name`` on this very installation, and the way by hand."""
    program = Path(__file__).absolute().parent.parent  # a folder that Python runs
    variant = "binary" if "binary" in name else "ternary"
    container = "gemlite" if "gemlite" in name else "mlx"
    folder = folder_paths.get_folder_paths("diffusers")[0]
    form = ["--format", "gemlite"] if container == "gemlite" else []
    # Its default, as in ``standalone/download.py``.
    place = [] if Path(folder) == program.parents[1] / "models" / "diffusers" else ["--to", folder]
    command = shell_command(sys.executable, str(program), "download", "--variant", variant, *form, *place)
    return (f"run {command} in a terminal, or put all of https://huggingface.co/{RELEASES[variant, container].id} "
            f"into {Path(folder) / name}, and press R")


def shell_command(*words: str) -> str:
    """``words`` as they have to be typed into a terminal of this system."""
    if os.name != "nt":
        return shlex.join(words)
    command = subprocess.list2cmdline(words)
    # PowerShell takes a line that begins with a quoted path for a text, the older prompt knows no &.
    return f"{command} (in PowerShell with & before it)" if command.startswith('"') else command
