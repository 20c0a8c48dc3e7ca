"""Bonsai Image for ComfyUI: PrismML's 1-bit and ternary FLUX.2 Klein 4B as an ordinary MODEL, CLIP and VAE."""

__version__ = "0.1.0"

#: The help pages. Registered here, the host serves them under the name of the folder that the pack was installed in,
#: which is where the frontend looks; ``tool.comfy.web`` in pyproject.toml would use the project's name.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI to get the nodes. Outside ComfyUI it is never called, and nothing of the host is imported."""
    from .nodes import BonsaiExtension

    return BonsaiExtension()
