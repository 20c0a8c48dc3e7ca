"""What keeps a broken version off the registry, where a version can never be replaced; and the CI files."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

from bonsai_image.tools import release

ROOT = Path(__file__).parent.parent
VERSION = release.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
STATING = ("pyproject.toml", "__init__.py", "CHANGELOG.md")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of the files that state the version, with a dated heading in the changelog."""
    for name in STATING:
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(changelog.read_text(encoding="utf-8").replace(
        "## [Unreleased]", f"## [Unreleased]\n\n## [{VERSION}] - 2026-12-01"), encoding="utf-8")
    return tmp_path


def test_the_version_is_stated_everywhere(repository):
    assert release.version_problems(repository, f"v{VERSION}") == []


@pytest.mark.parametrize("name", STATING)
def test_a_version_that_differs_is_found(repository, name):
    path = repository / name
    path.write_text(path.read_text(encoding="utf-8").replace(VERSION, "9.9.9"), encoding="utf-8")
    assert [problem.split()[0] for problem in release.version_problems(repository, f"v{VERSION}")] == [name]


def test_an_undated_changelog_is_found():
    assert any("CHANGELOG.md" in problem for problem in release.version_problems(ROOT, "v0.0.0"))


def test_missing_addresses_are_found(repository):
    path = repository / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    filled = re.sub(r"^# (?=\[project\.urls|Repository|Issues|Icon|Banner)", "", text, flags=re.MULTILINE)
    assert filled != text, "pyproject.toml has the lines to fill in"
    path.write_text(filled, encoding="utf-8")
    assert release.address_problems(repository) == []
    path.write_text(filled.replace("https://", "http://"), encoding="utf-8")
    assert len(release.address_problems(repository)) == 4


@pytest.mark.parametrize(("name", "present"), [("ops/linear.py", False), ("tests/conftest.py", True)])
def test_an_archive_without_what_it_needs_or_with_what_it_does_not(tmp_path, name, present):
    archive = tmp_path / "node.zip"
    with zipfile.ZipFile(archive, "w") as writing:
        for needed in {*release.NEEDED, name} if present else set(release.NEEDED) - {name}:
            writing.writestr(needed, "")
    assert release.archive_problems(archive) == [f"node.zip {'holds' if present else 'lacks'} {name}"]


def test_what_an_archive_needs_is_in_the_repository():
    assert [name for name in release.NEEDED if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_github_files(path):
    """Valid YAML; every action is pinned to a commit, and no step of a workflow writes to the repository."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
    if "jobs" in content:
        assert content["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in content["jobs"].values())
