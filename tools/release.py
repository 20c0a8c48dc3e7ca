"""Check that this repository may be published under a tag: ``python tools/release.py v0.1.0 node.zip``.

``node.zip`` is what ``comfy node pack`` made. Nothing is changed; every problem is printed, and the exit status is 1 if
there is one.
"""

import re
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
#: What the nodes cannot do without, and what a user of the nodes has no use for.
NEEDED = ("__init__.py", "__main__.py", "published.py", "pyproject.toml", "requirements.txt", "LICENSE", "NOTICE",
          "nodes/__init__.py", "ops/linear.py", "loaders/__init__.py", "standalone/cli.py",
          "web/text.js", "web/docs/BonsaiCheckpointLoader.md", "locales/en/nodeDefs.json",
          "example_workflows/1 Text to image.json")
LEFT_OUT = ("tests/", "benchmarks/", "miniature/", "tools/", "docs/", ".github/", ".ci/")
LARGEST_ARCHIVE = 10_000_000


def version_problems(root: Path, tag: str) -> list[str]:
    """Where pyproject.toml, ``__version__`` and CHANGELOG.md differ from ``tag``."""
    version = tag.removeprefix("v")
    stated = {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"],
        "__init__.py": _found(r'^__version__ = "(.+)"$', root / "__init__.py"),
        "CHANGELOG.md": _found(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", root / "CHANGELOG.md"),
    }
    return [f"{name} says {value}, the tag {version}" for name, value in stated.items() if value != version]


def _found(pattern: str, path: Path) -> str | None:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match and match[1]


def address_problems(root: Path) -> list[str]:
    """Which of the addresses that the registry shows are missing in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    urls, comfy = project["project"].get("urls", {}), project["tool"]["comfy"]
    wanted = {"project.urls.Repository": urls.get("Repository"), "project.urls.Issues": urls.get("Issues"),
              "tool.comfy.Icon": comfy.get("Icon"), "tool.comfy.Banner": comfy.get("Banner")}
    return [f"pyproject.toml: {name} is not an https address" for name, url in wanted.items()
            if not url or urlsplit(url).scheme != "https"]


def archive_problems(archive: Path) -> list[str]:
    """What is missing in, or too much for, the archive that would be published."""
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
    found = [f"{archive.name} lacks {name}" for name in NEEDED if name not in names]
    found += [f"{archive.name} holds {name}" for name in sorted(names) if name.startswith(LEFT_OUT)]
    if archive.stat().st_size > LARGEST_ARCHIVE:
        found.append(f"{archive.name} has {archive.stat().st_size} bytes, more than {LARGEST_ARCHIVE}")
    return found


def main() -> int:
    """Print every problem; 0 if there is none."""
    tag, archive = sys.argv[1:]
    problems = version_problems(ROOT, tag) + address_problems(ROOT) + archive_problems(Path(archive))
    print("\n".join(problems) or f"{tag} may be published")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
