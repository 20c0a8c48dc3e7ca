"""A LoRA that brings a packed model nearer to the dense one: distilled along the dense model's own trajectories."""
