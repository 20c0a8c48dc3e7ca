"""Packed linear algebra: the packed weight, the layers that compute with it, and the backends that multiply it."""

from . import aten  # noqa: F401 (registers what torch operators do to a packed weight)
from .backends import NAMES, PRECISIONS, Setting
from .linear import PackedEmbedding, PackedLinear, embedding, linear
from .packed import Packed, dequantize, is_packed, pack_codes, packed_nbytes, packed_weight, unpack_codes, unwrap

__all__ = ["NAMES", "PRECISIONS", "Packed", "PackedEmbedding", "PackedLinear", "Setting", "dequantize", "embedding",
           "is_packed", "linear", "pack_codes", "packed_nbytes", "packed_weight", "unpack_codes", "unwrap"]
