"""MLX, for Apple silicon: the backend, and its arrays."""
