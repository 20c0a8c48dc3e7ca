"""What ``generate`` says about GPU memory before it loads. ``tests/host/test_gpu_memory.py`` counts the figures."""

from types import SimpleNamespace

import pytest
import torch

from bonsai_image.standalone import memory

CUDA = torch.device("cuda")


@pytest.fixture
def repository(tmp_path):
    """A repository whose text encoder takes as much disk as a full-size one (the file is sparse)."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(2_300_000_000)
    return SimpleNamespace(text_encoder=tmp_path)


@pytest.mark.parametrize(("free", "fits"), [(12e9, True), (1e9, False)])
def test_the_peak_is_stated_and_too_little_memory_is_warned_of(repository, monkeypatch, free, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(free), 24_000_000_000))
    text = memory.note(repository, CUDA, 1024, 1024, 0, "exact")
    assert text.startswith(f"1024 x 1024 takes about 2.2 GB of GPU memory, of which {free / 1e9:.1f} GB are free.")
    assert ("smaller size" in text) != fits


def test_nothing_is_stated_of_other_devices_and_models(repository, tmp_path):
    assert memory.note(repository, torch.device("cpu"), 1024, 1024, 0, "exact") is None
    (tmp_path / "model.safetensors").write_bytes(b"small")
    assert memory.note(repository, CUDA, 1024, 1024, 0, "exact") is None


def test_larger_images_and_references_take_more():
    peaks = [memory.counted_peak(*case) for case in ((512, 512), (1024, 1024), (1024, 1024, 1, 1), (2048, 2048))]
    assert peaks == sorted(set(peaks))
