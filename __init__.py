"""Bonsai Image for ComfyUI: PrismML's 1-bit and ternary FLUX.2 Klein 4B as an ordinary MODEL, CLIP and VAE."""

__version__ = "0.1.0"

#: The help pages. Registered here, ComfyUI serves them under the name of the installation folder, where the frontend
#: looks for them; ``tool.comfy.web`` in pyproject.toml would use the project's name.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI to get the nodes. Importing the package alone needs no ComfyUI."""
    from .nodes.definitions import BonsaiExtension

    return BonsaiExtension()
