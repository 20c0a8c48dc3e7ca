"""Which published file a file is: by size, and by SHA-256 where asked."""

import hashlib
import re

import pytest
import torch

from bonsai_image import published
from bonsai_image.loaders.description import publication, sha256
from bonsai_image.loaders.files import no_progress
from bonsai_image.loaders.klein import KleinConfig, diffusers_shapes, is_packable
from bonsai_image.loaders.qwen3 import Qwen3Config, qwen3_shapes
from bonsai_image.standalone.download import main
from bonsai_image.tests.support.published_files import MLX_TEXT_BYTES, mlx, write_sparse

CONTENT = b"weights" * 1000
NAME = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"


@pytest.fixture
def file(tmp_path, monkeypatch):
    repository = published.Release("prism-ml/bonsai-x", "0123456789abcdef", (
        published.File(NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()), published.File("vae/a.pt", 3)))
    monkeypatch.setattr(published, "RELEASES", {("ternary", "mlx"): repository})
    path = tmp_path / "models--prism-ml--bonsai-x" / "snapshots" / "abc" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return path


def test_the_published_file(file):
    where = "the published file of prism-ml/bonsai-x, revision 0123456789"
    assert publication(file) == f"as long as {where}; its hash was not compared"
    progress = []
    digest = sha256(file, lambda done, total: progress.append((done, total)))
    assert publication(file, digest) == "published file of prism-ml/bonsai-x, revision 0123456789"
    assert progress == [(len(CONTENT), len(CONTENT))]


def test_a_difference_is_named(file):
    file.write_bytes(b"W" + CONTENT[1:])
    assert re.fullmatch("not the published file of prism-ml/bonsai-x, .* SHA-256 [0-9a-f]{10}, not [0-9a-f]{10}",
                        publication(file, sha256(file, no_progress)))
    file.write_bytes(CONTENT[1:])
    assert publication(file) == "not the published file: 6,999 bytes, not 7,000"


def test_a_hash_that_is_not_known(file, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"abc")
    assert "whose hash is not known here" in publication(tmp_path / "a.pt", "0" * 64)


def test_a_file_of_ones_own(file, tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"own weights")
    assert publication(tmp_path / "own.safetensors") is None


def test_what_is_known_is_whole():
    sizes = {(file.path.split("/")[-2], file.size) for repository in published.RELEASES.values()
             for file in repository.files}
    assert len({size for _, size in sizes}) == len(sizes), "a size names one file"
    for repository in published.RELEASES.values():
        assert repository.commit is None or re.fullmatch("[0-9a-f]{40}", repository.commit)
        assert all(file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256) for file in repository.files)


@pytest.mark.parametrize(("variant", "bits"), [("ternary", 2), ("binary", 1)])
def test_a_diffusion_model_is_by_default_that_of_the_release(variant, bits, tmp_path):
    shapes = mlx(diffusers_shapes(KleinConfig()), bits, 128, lambda name, _: is_packable(name))
    write_sparse(tmp_path / "model.safetensors", shapes)
    assert (tmp_path / "model.safetensors").stat().st_size == published.RELEASES[variant, "mlx"].files[0].size


def test_a_text_encoder_is_by_default_that_of_the_release():
    shapes = mlx(qwen3_shapes(Qwen3Config()), 4, 64, lambda _, shape: len(shape) == 2)
    assert sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values()) == MLX_TEXT_BYTES


def test_what_is_not_offered_is_not_downloaded(capsys):
    with pytest.raises(SystemExit):
        main(["download", "--variant", "ternary", "--format", "unpacked"])
    assert "invalid choice" in capsys.readouterr().err
