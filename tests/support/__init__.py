"""What several tests and benchmarks share: models, files, references, and the ComfyUI around them."""
