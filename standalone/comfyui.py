"""The ComfyUI that this belongs to and its model folders, read from its files: importing ComfyUI would start it.

Its data (``models``, ``custom_nodes``, ``user``) may lie in another folder than its code: ComfyUI Desktop and
``--base-directory`` do that.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..loaders import ModelFileError
from ..loaders.errors import refusing
from ..loaders.files import read_json

#: ComfyUI Desktop and its successor: the folders of their settings, and their lists of further model folders.
_DESKTOP = {"ComfyUI": "extra_models_config.yaml", "Comfy Desktop": "shared_model_paths.yaml"}


def find(program: Path) -> Path | None:
    """The folder with the data of the ComfyUI that has ``program`` in its ``custom_nodes``, else of the one that this
    Python belongs to, else of another on this machine."""
    # Lexically first: the folder of the pack may be a link.
    near = [place.parent.parent for place in (program, program.resolve()) if place.parent.name == "custom_nodes"]
    prefix = Path(sys.prefix)  # ComfyUI/.venv, or python_embeded beside ComfyUI
    places = (*near, prefix.parent, prefix.parent / "ComfyUI", Path.cwd(), *_desktop_bases())
    marks = "models", "comfyui_version.py"
    return next((base for base in places if any((base / mark).exists() for mark in marks)), None)


def version(base: Path) -> str | None:
    """ComfyUI's version, from its code beside the data in ``base``, else from the newest of its logs there."""
    logs = [log for folder in (base / "user", *(settings / "logs" for settings in _settings()))
            for log in folder.glob("comfyui*.log")]
    for file in (base / "comfyui_version.py", *sorted(logs, key=lambda log: -log.stat().st_mtime)):
        with contextlib.suppress(OSError):
            text = file.read_text(encoding="utf-8", errors="replace")
            if match := re.search(r'(?:__version__ = "|ComfyUI version: )([\w.+-]+)', text):
                return match[1]
    return None


def listed(base: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of every folder that is listed for the ComfyUI in ``base``, or for ComfyUI Desktop.

    Raises ModelFileError for a list that cannot be read.
    """
    lists = [base / "extra_model_paths.yaml", *(folder / _DESKTOP[folder.name] for folder in _settings())]
    return [line for file in lists for line in _listed(file)]


def _settings() -> list[Path]:
    """The folders in which ComfyUI Desktop keeps its settings."""
    home = Path.home()
    root = {"win32": os.environ.get("APPDATA") or home / "AppData" / "Roaming",
            "darwin": home / "Library" / "Application Support"}.get(
                sys.platform, os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return [Path(root) / name for name in _DESKTOP]


def _desktop_bases() -> Iterator[Path]:
    """The folders that the user chose for the data of ComfyUI Desktop."""
    for folder in _settings():
        with contextlib.suppress(ModelFileError):
            if isinstance(base := read_json(folder / "config.json").get("basePath"), str):
                yield Path(base)
        with contextlib.suppress(ModelFileError):
            yield from (path.parent for name, path in _listed(folder / _DESKTOP[folder.name]) if name == "custom_nodes")


def _listed(file: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each line of a list as ComfyUI reads it; none if there is no such file."""
    if not file.is_file():
        return []
    import yaml  # ComfyUI brings it

    found = []
    with refusing(file, "lists of model folders as in ComfyUI's extra_model_paths.yaml.example", "correct that file",
                  OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        sections: dict[str, dict[str, Any] | None] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            lines = dict(section or {})
            base = file.parent / os.path.expandvars(os.path.expanduser(lines.pop("base_path", None) or ""))
            lines.pop("is_default", None)
            found += [(kind, Path(os.path.normpath(base / line))) for kind, text in lines.items()
                      for line in text.splitlines() if line]
    return found
