"""The embedded host: the same loaders and layers driven by diffusers, headless, on the command line."""

import traceback


def broken_import(error: BaseException) -> str | None:
    """The library whose import raised ``error``, or None if something else did."""
    package, name = __name__.partition(".")[0], getattr(error, "name", None) if isinstance(error, ImportError) else None
    modules = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name)
               for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = max((i for i, (module, _) in enumerate(modules) if module.startswith(package)), default=0)
    if not name and modules[last][1] == "<module>":
        name = next((module for module, _ in modules[last + 1 :] if not module.startswith("importlib")), None)
    library = (name or package).partition(".")[0]
    return None if library == package else library
