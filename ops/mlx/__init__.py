"""MLX, for Apple silicon: the backend, arrays, and the whole transformer."""
