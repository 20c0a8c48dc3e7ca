"""How the miniature was trained, and how its images are measured."""
