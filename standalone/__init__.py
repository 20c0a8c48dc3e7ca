"""The embedded host: the same loaders and layers driven by diffusers, headless, on the command line."""
