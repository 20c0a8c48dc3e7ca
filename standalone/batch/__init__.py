"""Many images: rows of a table through encode, denoise, decode and write, on one machine or on a Ray cluster."""
