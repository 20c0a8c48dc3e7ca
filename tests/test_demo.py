"""The demo of the trained miniature."""

import json

import pytest
from PIL import Image

from bonsai_image.miniature import demo


def test_a_contact_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[1:3])
    out = tmp_path / "new" / "demo.png"
    assert demo.main(["--out", str(out), "--device", "cpu"]) == 0
    image = Image.open(out)
    settings = json.loads(image.text["bonsai"])
    assert {name: one["source"] for name, one in settings.items()} == {
        "dense": "miniature", "ternary": "ternary", "ternary + LoRA": "ternary", "binary": "miniature/train",
        "binary + LoRA": "miniature/train"}
    # The second prompt of these, a red star on black, in the second row, that of the ternary model.
    left, top = 118 + 136, 8 + 136
    assert image.getpixel((left + 4, top + 4)) < (60, 60, 60) and image.getpixel((left + 64, top + 99))[0] > 150
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("dense", "ternary", "binary", "denoise", " MB", "1.14 MB"))


def test_steps_and_seed(tmp_path, monkeypatch, capsys):
    taken = []

    def generate(_repository, _prompts, _compute, *settings, **more):
        taken.append((*settings, more["progress"]))
        raise ValueError("enough")

    monkeypatch.setattr(demo, "generate", generate)
    words = f"--out {tmp_path / 'a.png'} --device cpu --steps 2 --seed 5 --json"
    assert demo.main(words.split()) == 2
    assert taken[0][-3:] == (2, 5, False)
    assert capsys.readouterr().err == "bonsai-image: enough\n"


@pytest.mark.parametrize("option", [("--device", "quantum"), ("--out", "picture.gif")])
def test_an_unusable_option_draws_nothing(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "generate", None)
    try:
        status = demo.main(list(option))
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and option[1] in capsys.readouterr().err and not list(tmp_path.iterdir())
