"""Triton and GemLite kernels on a machine without a GPU: helpers that run in processes of their own."""
