"""The real ComfyUI, imported from COMFYUI_PATH and run on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve()

if str(COMFYUI) not in sys.path:
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = True


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return COMFYUI
