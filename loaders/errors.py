"""The one exception for files that cannot be used."""

from __future__ import annotations

from pathlib import Path


class PackError(Exception):
    """A file or folder is not a usable Bonsai pack. The message is one sentence a user can act on."""

    def __init__(self, path: Path | str, expected: str, found: str, action: str):
        self.path = Path(path)
        super().__init__(f"{path}: expected {expected}, found {found}; {action}.")


#: What to do when a file is damaged rather than of the wrong kind.
DOWNLOAD_AGAIN = "download the file again"
