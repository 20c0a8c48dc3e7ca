"""Our Triton kernels for GPUs: the backend, and what it launches."""
