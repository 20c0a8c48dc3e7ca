"""Packed linear algebra: the canonical packed weight, its codecs, the layers that compute with it, the backends."""
