"""diffusers' FLUX.2 transformer, computed in MLX (``ops/mlx/klein.py``)."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from ..loaders import Transformer
from ..loaders.names import to_comfyui


class MlxTransformer(torch.nn.Module):
    """Takes the place of ``diffusers.Flux2Transformer2DModel`` in a pipeline.

    The weights live in MLX alone. ``device`` and ``dtype`` are those of the tensors that go in and come out.
    """

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype):
        from ..ops.mlx import klein as mlx_klein

        super().__init__()
        self.config = SimpleNamespace(**model.config.diffusers())
        self.device, self.dtype = device, dtype
        self._step = mlx_klein.step
        self._weights = mlx_klein.load(to_comfyui(model.tensors), dtype)

    def cache_context(self, name: str) -> nullcontext:
        """Nothing is cached between steps."""
        return nullcontext()

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor,
                img_ids: torch.Tensor, txt_ids: torch.Tensor, guidance: None = None,
                joint_attention_kwargs: dict | None = None, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Like diffusers': tokens ``(B, L, C)``, timestep ``(B,)`` from 0 to 1, ids ``(L, 4)`` or ``(B, L, 4)`` ->
        the prediction ``(B, L, C)`` in a tuple. Raises ValueError for what FLUX.2 Klein or this forward lacks."""
        if guidance is not None or joint_attention_kwargs or return_dict:
            raise ValueError("the MLX transformer takes no guidance and no attention arguments and returns a tuple")
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        return (self._step(self._weights, hidden_states, img_ids, encoder_hidden_states, txt_ids, timestep),)
