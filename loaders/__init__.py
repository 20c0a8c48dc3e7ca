"""Files to canonical state dicts, and back. ``formats`` has one file per format of weights.

The names below are for programs that use this as a library (``docs/library.md``); the hosts beside it import from the
modules as well, whose names without an underscore they may use.
"""

from .errors import ModelFileError
from .formats import container_suffixes, targets
from .lora import Lora, load_lora, save_lora
from .models import (
    TextEncoder,
    Transformer,
    Vae,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from .repository import Repository, find_repository, is_repository
from .whole import is_whole, save_repository

__all__ = ["Lora", "ModelFileError", "Repository", "TextEncoder", "Transformer", "Vae", "container_suffixes",
           "find_repository", "is_repository", "is_whole", "load_lora", "load_text_encoder", "load_transformer",
           "load_vae", "save_lora", "save_repository", "save_transformer", "targets"]
