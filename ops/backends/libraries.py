"""The libraries that backends are built on. Whatever is wrong with one becomes a sentence; the next backend takes over.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch

#: What a library or a plugin of it may raise. Ctrl-C and a host's interrupt, both plain BaseExceptions, pass.
FAILURES = (Exception, SystemExit)

_LOG = logging.getLogger(__name__)
_FULL = re.compile(r"out[ _]?of[ _]?(\w+[ _])?memory|(insufficient|not enough|can.?t allocate|cannot allocate) memory|"
                   r"alloc_failed", re.IGNORECASE)


class Library(NamedTuple):
    """An optional library: the name that pip and Python know, the module that must import, the ``oldest`` release that
    the extras of ``pyproject.toml`` allow, what installs that, and what to do where a newer one fails."""

    name: str
    module: str
    oldest: str
    install: str
    remedy: str


TORCH = Library("torch", "torch", "2.8", "update PyTorch", "reinstall PyTorch")
LLVMLITE = Library("llvmlite", "llvmlite.binding", "0.50", "pip install --upgrade llvmlite",
                   "pip install --force-reinstall llvmlite")
#: Linux gets Triton with PyTorch, Windows does not.
TRITON = Library("triton", "triton.language", "3.6", "pip install triton, on Windows pip install triton-windows",
                 "update the GPU's driver and Triton")
#: 0.5.1 lacks what Triton 3.8 took away; 0.6 needs Triton 3.6.
GEMLITE = Library("gemlite", "gemlite.core", "0.6",
                  "pip install --upgrade gemlite, on Windows pip install --upgrade --no-deps gemlite",
                  "update gemlite (pip install --upgrade gemlite), and Triton (with PyTorch) if it is below 3.6")
MLX = Library("mlx", "mlx.core", "0.32.4", "pip install --upgrade mlx",
              "reinstall MLX for this macOS (pip install --force-reinstall --no-cache-dir mlx mlx-metal, in a native "
              "arm64 Python), or update MLX and, on macOS 26.0 or 26.1, macOS to 26.2")


def problem(library: Library, use: Callable[[], object] = lambda: None) -> str | None:
    """Why ``library`` cannot be used here, or None. Imports it and calls ``use``, which tries it.

    Only running out of memory in ``use`` is raised.
    """
    if found := missing(library):
        return found
    before = set(sys.modules)
    try:
        importlib.import_module(library.module)
    except FAILURES as failure:
        found = sentence(library, failure)
        # Left half imported, it would be found there by others: einops imports MLX for every tensor that it sees.
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] == library.name:
                sys.modules.pop(name, None)
        return found
    try:
        use()
    except FAILURES as failure:
        if out_of_memory(failure):
            raise
        return sentence(library, failure)
    return None


@contextmanager
def contained(library: Library, what: str) -> Iterator[None]:
    """Logs what fails inside, and lets the caller go on behind it. Running out of memory is raised."""
    try:
        yield
    except FAILURES as failure:
        if out_of_memory(failure):
            raise
        _LOG.warning("Bonsai Image: %s.", sentence(library, failure, what))


def missing(library: Library) -> str | None:
    """That ``library`` is not installed, or None. Imports nothing."""
    with suppress(*FAILURES):  # what stands in sys.modules may have no spec
        if importlib.util.find_spec(library.name) is None:
            return f"{library.name} is not installed ({library.install.replace('--upgrade ', '')})"
    return None


def sentence(library: Library, failure: BaseException | str, what: str = "fails on this machine") -> str:
    """What happened and what to do, without a full stop; with the version found, and the one that is needed."""
    if isinstance(failure, BaseException):
        lines = str(failure).strip().splitlines()
        failure = f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__
    found = version(library.name, library.module)
    old = found is not None and () < release(found) < release(library.oldest)
    cure = f"{library.oldest} or newer is needed ({library.install})" if old else f"to repair it: {library.remedy}"
    return f"{' '.join(filter(None, (library.name, found)))} {what} ({failure}); {cure}"


def version(name: str, module: str = "") -> str | None:
    """The version of ``module`` or ``name`` that was imported, else the one that is installed (Triton has several names
    there), or None."""
    with suppress(*FAILURES):
        for imported in (module, name):
            if isinstance(found := getattr(sys.modules.get(imported), "__version__", None), str):
                return found
        return importlib.metadata.version(name)
    return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version that count."""
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out, which says nothing of a library. Triton, Metal and Level Zero raise RuntimeError."""
    return isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or _FULL.search(str(failure)) is not None
