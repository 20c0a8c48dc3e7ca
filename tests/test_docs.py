"""What the pages say exists: links and their anchors, files, commands of the program, options of the benchmarks."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from bonsai_image.standalone.options import parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md"),
                *(ROOT / "web" / "docs").glob("*.md"), *(ROOT / ".github").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
#: Paths in this repository, as they are written in backticks.
FOLDERS = "ops|loaders|nodes|standalone|tests|benchmarks|miniature|tools|docs|web|locales"
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*\w)/?`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken(page: Path) -> list[str]:
    """Links of ``page`` to files or headings that are not there, and paths in backticks that are not."""
    text = page.read_text(encoding="utf-8")
    found = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", FENCE.sub("", text)):
        target = next(filter(None, link))
        if re.match(r"\w+:", target):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / unquote(name) if name else page
        if not path.exists() or (heading and heading not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_files_exist(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "page.md").write_text("# One\n[a](#one) [b](#two) [c](none.md) `ops/none.py` `ops/linear.py`\n")
    assert broken(tmp_path / "page.md") == ["ops/none.py", "#two", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    """Every `bonsai-image COMMAND`, also by way of __main__.py, is one of the program's, and so are its options."""
    (commands,) = (action.choices for action in parser()._actions if isinstance(action.choices, dict))
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:bonsai-image|__main__\.py) ([a-z]+)((?: +[^\n`|]*)?)", text):
        if name not in commands:
            assert name in ("and", "is", "on", "in", "folder"), name
        elif name != "download":
            known = {option for action in commands[name]._actions for option in action.option_strings}
            assert set(re.findall(r"(?<!\w)--[a-z][\w-]+", rest)) <= known, (name, rest)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_benchmark_options_exist(page):
    for script, rest in re.findall(r"python ((?:benchmarks|tools|miniature/train)/\w+\.py)([^\n`]*)",
                                   page.read_text(encoding="utf-8")):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z][\w-]+", rest)), (script, rest)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
