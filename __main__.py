"""The command line: ``bonsai-image``, ``python -m bonsai_image``, or this file by its path.

By its path it works in any folder of any name, such as one under ``custom_nodes`` that was never pip-installed.
"""

import importlib.util
import sys
from pathlib import Path


def _package() -> str:
    """The import name of this folder. Run by its path, the folder has none yet and becomes ``bonsai_image``."""
    if __package__:
        return __package__
    folder = Path(__file__).absolute().parent  # lexically: it may be a link in custom_nodes
    # Python puts the script's folder first on the path, where ``nodes`` and ``tests`` would shadow other packages.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder.resolve()]
    spec = importlib.util.spec_from_file_location("bonsai_image", folder / "__init__.py")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return spec.name


def main() -> int:
    """Run one command and return its exit status. ``download`` runs without importing torch."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in Jupyter
            # Unencodable characters must not crash a finished command.
            stream.reconfigure(errors="backslashreplace")
    try:
        name = "download" if sys.argv[1:2] == ["download"] else "cli"
        return importlib.import_module(f".standalone.{name}", _package()).main(sys.argv[1:])
    except KeyboardInterrupt:
        print("bonsai-image: cancelled.", file=sys.stderr)
        return 130
    except (Exception, SystemExit) as error:
        library = importlib.import_module(".standalone", _package()).broken_import(error)
        if library is None:
            raise
        fault = "has no" if isinstance(error, ModuleNotFoundError) else "cannot import"
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"bonsai-image: {sys.executable} {fault} {library} ({said}); install or update it with pip, or use the "
              "Python that runs ComfyUI.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
