"""The one exception for files that cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..disk import phrase, reason

#: Remedies: for a damaged file, for files that do not belong together, and for a file of the wrong kind.
DOWNLOAD_AGAIN = "download the file again"
DOWNLOAD_FOLDER = "download the whole folder again"
DOWNLOAD_REPOSITORY = "download the whole repository again"
CHOOSE_MODEL = "choose a diffusion model of PrismML's Bonsai Image 4B"
CHOOSE_TEXT_ENCODER = "choose the text encoder of Bonsai Image"
CHOOSE_UNMODIFIED = "choose an unmodified file"


class ModelFileError(Exception):
    """A file or folder cannot be used. The message is one sentence a user can act on; its parts are attributes.

    The ``action`` is that for a damaged file unless another is given.
    """

    def __init__(self, path: Path | str, expected: str, found: str, action: str = DOWNLOAD_AGAIN):
        self.path, self.expected, self.found, self.action = Path(path), expected, found, action
        super().__init__(f"{path}: expected {phrase(expected)}, found {phrase(found)}; {action}.")


@contextmanager
def refusing(path: Path | str, expected: str, action: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise ModelFileError in the place of any of ``errors``, whose message is what was found."""
    try:
        yield
    except errors as error:
        raise ModelFileError(path, expected, reason(error), action) from error
