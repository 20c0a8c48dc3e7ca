"""Files to canonical state dicts. One file per published format; ``detect`` finds which one a path holds."""

from .detect import (
    Repository,
    TextEncoder,
    Transformer,
    find_repository,
    is_repository,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from .errors import ModelFileError
from .save import TARGETS, save_transformer

__all__ = ["TARGETS", "ModelFileError", "Repository", "TextEncoder", "Transformer", "find_repository", "is_repository",
           "load_text_encoder", "load_transformer", "load_vae", "save_transformer"]
