"""What the repository ships for the frontend, and the files that its workflows tell a user to download."""

import asyncio

from bonsai_image.nodes.definitions import BonsaiExtension
from bonsai_image.tests.support.comfyui_server import ROOT
from bonsai_image.tools import workflows as tool

#: Node schemas by node id.
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(BonsaiExtension().get_node_list())}
WORKFLOWS = [ROOT / "example_workflows" / f"{name}.json" for name in tool.WORKFLOWS]
#: Its file name is the name that the frontend shows.
BLUEPRINT = ROOT / "subgraphs" / f"{tool.BLUEPRINT}.json"
#: The repository that the notes tell a user to download.
DOWNLOADED = "bonsai-image-ternary-4B-mlx-2bit"
#: The folder of images with captions that the notes tell a user to make.
TRAINING = "training"
#: What else the notes tell a user to get: names of files by the host's folder kind.
FILES = {kind: list(files) for kind, files in tool.FILES.items()} | {"loras": ["flux2_klein_4b_lora.safetensors"]}
