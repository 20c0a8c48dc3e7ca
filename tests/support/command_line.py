"""The command line in this process, for tests."""

from pathlib import Path

from bonsai_image.standalone.cli import main

#: The trained miniature.
MINIATURE = Path(__file__).parents[2] / "miniature"
BINARY = MINIATURE / "binary.safetensors"
#: A quick image on the CPU.
SMALL = ("--width", 64, "--height", 64, "--device", "cpu")


def run(*argv) -> int:
    """The exit status of ``bonsai-image`` with these words."""
    return main([str(word) for word in argv])


def sentence(capsys) -> str:
    """The error message, which has to be one line."""
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("bonsai-image: ")
    return said
