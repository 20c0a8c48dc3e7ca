"""The nodes (ComfyUI V3 schema). The only folder that imports the host."""
