"""What PrismML has published of Bonsai Image 4B: repositories on the Hugging Face Hub, revisions, weight files.

Nothing is imported here, so that ``bonsai-image download`` needs no torch. Sizes and hashes are those that the Hub
lists at these commits; a hash is left out where it is not known in full.
"""

from typing import NamedTuple

#: Where ``bonsai-image download`` records what it fetched, in the repository's folder.
RECORD = "bonsai-download.json"

#: A folder of this ending is a download that is not finished.
PARTIAL = ".partial"


class File(NamedTuple):
    """One weight file: its path in the repository, its bytes, its SHA-256 if known."""

    path: str
    size: int
    sha256: str | None = None


class Release(NamedTuple):
    """One repository of the Hub. ``commit`` is None where the full one is not known."""

    id: str
    commit: str | None
    files: tuple[File, ...]


_VAE = File("vae/diffusion_pytorch_model.safetensors", 168120878)
_MLX = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"
_MLX_REST = File("text_encoder-mlx-4bit/model.safetensors", 2263022529), _VAE
_GEMLITE_REST = File("text_encoder-hqq-4bit/qmodel.pt", 2822340711), _VAE

#: By what ``bonsai-image download`` calls its variant and format.
RELEASES = {
    ("ternary", "mlx"): Release(
        "prism-ml/bonsai-image-ternary-4B-mlx-2bit", "2c24c81b934a658ba5590cf39088ba929985b4a8",
        (File(_MLX, 1425271472, "b21737bdf02690b7d662907781c4dc8b8bf22a2c98b823b1ca3336f48371a84f"), *_MLX_REST)),
    ("binary", "mlx"): Release(
        "prism-ml/bonsai-image-binary-4B-mlx-1bit", "d1b3ac11a7f1ba61d84b277339daeeed4a98e0e2",
        (File(_MLX, 965208136, "1792b31d857d95fcbe32df8e6d2fc96b30e800a195e295565d033deccea2dd75"), *_MLX_REST)),
    ("ternary", "gemlite"): Release(
        "prism-ml/bonsai-image-ternary-4B-gemlite-2bit", "bf047aa80569f193d2c4960033af6ba2629988fa",
        (File("transformer-gemlite-int2/state_dict.pt", 1540457482,
              "a3a7df8a90374fea24afce3b36f00b4c728d0254717143d61f912a7b3070e7ac"), *_GEMLITE_REST)),
    ("binary", "gemlite"): Release(
        "prism-ml/bonsai-image-binary-4B-gemlite-1bit", "121529b06562ff8c5b75aa34c54c371d2655929b",
        (File("transformer-gemlite-int1/state_dict.pt", 1080394762,
              "d5b455b11958fc92ed8dd7558072252d6ca8d1acb4fcc69281fb61b771f7c8e0"), *_GEMLITE_REST)),
    ("ternary", "unpacked"): Release(
        "prism-ml/bonsai-image-ternary-4B-unpacked", None,
        (File("transformer/diffusion_pytorch_model.safetensors", 7751109712,
              "fa5fd18239aadc41d3bec64810479fd3aed5182946f70e2d894f747cf4e35964"),)),
}


def _address(variant: str, number: int) -> str:
    repository = RELEASES[variant, "mlx"]
    return f"https://huggingface.co/{repository.id}/resolve/main/{repository.files[number].path}"


#: The same files one by one, whose names in the repositories say little: ComfyUI's folder -> a name for it there -> its
#: address.
SINGLE_FILES = {
    "diffusion_models": {"bonsai-image-ternary-4B-mlx-2bit.safetensors": _address("ternary", 0),
                         "bonsai-image-binary-4B-mlx-1bit.safetensors": _address("binary", 0)},
    "text_encoders": {"bonsai-image-qwen3-4B-mlx-4bit.safetensors": _address("ternary", 1)},
    "vae": {"bonsai-image-vae.safetensors": _address("ternary", 2)},
}


def weight_files() -> list[tuple[Release, File]]:
    """Every published weight file, with each repository that holds it: some share the text encoder and the VAE."""
    return [(repository, file) for repository in RELEASES.values() for file in repository.files]
