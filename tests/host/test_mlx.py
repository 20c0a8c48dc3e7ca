"""The MLX transformer under the real ComfyUI, in float32 on the CPU: MODEL against MODEL, torch against MLX."""

from __future__ import annotations

import dataclasses

import pytest
import torch

mx = pytest.importorskip("mlx.core")

import comfy.hooks  # noqa: E402
import comfy.sample  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402

from bonsai_image.nodes import mlx_path, models  # noqa: E402
from bonsai_image.nodes.info import describe  # noqa: E402
from bonsai_image.ops import mlx_arrays  # noqa: E402
from bonsai_image.standalone.miniature import random_transformer  # noqa: E402
