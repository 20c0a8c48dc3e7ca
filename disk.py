"""Writing to disks of any kind: whole files or none, renames that wait for a virus scanner, errors as sentences.

Only the standard library is imported here, so that ``bonsai-image download`` needs no torch.
"""

import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

#: How SMB, FUSE or a VirtualBox folder answers a request that it does not support.
_LACKING = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EACCES, errno.EPERM,
            errno.EBADF, errno.EISDIR, errno.EROFS}
#: Seconds between attempts to rename: on Windows a virus scanner holds what was just written.
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

#: What to do, by the error's number.
_ADVICE = {
    "free some space there": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "make the folder writable or choose another": (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY),
    "choose a shorter, simpler name": (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
    "check that the folder is still there": (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    "close programs that use much memory": (errno.ENOMEM,),
    "check the disk": (errno.EIO,),
}
#: Longest quotation, in characters, of what a file or a library says.
_LONGEST = 200


def phrase(text: str) -> str:
    """``text`` fit to stand inside one sentence. It may quote names from a hostile file and other libraries' errors:
    only its first sentence counts, on one line, printable and short."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    sentence = re.split(r"[.!?:;]*(?:[.!?] |$)", line, maxsplit=1)[0]
    return sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]}..."


def reason(error: BaseException) -> str:
    """What ``error`` says, as a phrase."""
    if isinstance(error, OSError) and error.strerror:
        return phrase(f"{error.strerror} ({error.filename})" if error.filename else error.strerror)
    return phrase(str(error)) or type(error).__name__


def advice(error: BaseException, otherwise: str = "check the disk and its free space") -> str:
    """What to do about ``error``, of the file system or of a library that quotes it (as ``os error 28``)."""
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = int(quoted[1]) if quoted else getattr(error, "errno", None)
    if isinstance(error, MemoryError) or (number is None and re.search(r"(?i)memory", str(error))):
        number = errno.ENOMEM
    return next((text for text, numbers in _ADVICE.items() if number in numbers), otherwise)


@contextmanager
def optional() -> Iterator[None]:
    """For what is only nice to have: passes over a file system that does not support it."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _LACKING:
            raise


def flush_path(path: Path) -> None:
    """Bring what was written to a file or, where the system can, the names in a folder to the disk. On macOS fsync
    reaches no further than the disk's own cache."""
    with optional():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            if full := getattr(fcntl, "F_FULLFSYNC", None):
                with optional():
                    fcntl.fcntl(descriptor, full)
                    return
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def patiently(action: Callable[..., T], *args: Any) -> T:
    """Rename or remove by ``action(*args)``, and try again for some seconds while another program holds the file."""
    for pause in _PAUSES:
        try:
            return action(*args)
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EBUSY:
                raise
        time.sleep(pause)
    return action(*args)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks. The system gives ``lock`` back when a process dies."""
    from filelock import FileLock  # a requirement of torch

    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
        yield


def write_whole(path: Path, content: bytes, again: bool = True) -> None:
    """Write a file under another name, flush it to the disk, and give it its own name: it is whole or not there."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_bytes(content)
        flush_path(partial)
        patiently(partial.replace, path)
    except FileNotFoundError:
        if not again:
            raise
        write_whole(path, content, again=False)  # another run took the file for what a killed one had left
    finally:
        partial.unlink(missing_ok=True)
    flush_path(path.parent)
