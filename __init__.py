"""Bonsai Image for ComfyUI: PrismML's 1-bit and ternary FLUX.2 Klein 4B as an ordinary MODEL, CLIP and VAE."""

__version__ = "0.1.0"


async def comfy_entrypoint():
    """Called by ComfyUI to get the nodes. Outside ComfyUI it is never called, and nothing of the host is imported."""
    from .nodes import BonsaiExtension

    return BonsaiExtension()
