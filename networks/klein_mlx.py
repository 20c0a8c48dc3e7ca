"""The whole FLUX.2 Klein transformer in MLX, as a function of its weights. Importing this imports MLX.

Weights go by ComfyUI's names (``loaders/klein.py``). A step crosses between torch and MLX twice: the inputs together
on the way in, the prediction on the way out. Everything in between stays in MLX.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import torch

from ..loaders.klein import FIXED, count_blocks
from ..ops.backends.mlx import arrays
from ..ops.packed import is_packed, unwrap

Weights = dict[str, arrays.PackedArrays | mx.array]

#: The timestep, in thousandths, becomes 256 sinusoids with periods from 1 to 10,000 (BFL's flux2, ``model.py``).
_TIME_CHANNELS, _TIME_PERIOD, _TIME_FACTOR = 256, 10000, 1000.0
_NORM_EPS, ROPE_AXES, ROPE_THETA = (FIXED[key] for key in ("eps", "axes_dims_rope", "rope_theta"))
_FP16_MAX = 65504.0


def load(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Weights:
    """The weights of one model in MLX, evaluated, for activations of ``dtype``."""
    weights = [unwrap(tensor) if is_packed(tensor) else tensor for tensor in tensors.values()]
    return dict(zip(tensors, arrays.weight_arrays(weights, dtype), strict=True))


def rotary_tables(ids: torch.Tensor, axes: Sequence[int], theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 ``(L, sum(axes) / 2)``, for position ids ``(L, len(axes))``.

    In float64 on the CPU: in float32 an angle of 1000 radians is off by up to 6e-5.
    """
    ids = ids.detach().cpu().double()
    angles = torch.cat([ids[:, i, None] * theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                        for i, dim in enumerate(axes)], dim=-1)
    return angles.cos().float(), angles.sin().float()


def time_embedding(timestep: torch.Tensor) -> torch.Tensor:
    """Sinusoids float32 ``(B, 256)``, cosines first, of timesteps ``(B,)`` from 0 to 1."""
    half = _TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(_TIME_PERIOD) * torch.arange(half, dtype=torch.float32) / half)
    angles = (_TIME_FACTOR * timestep.detach().cpu().float())[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def step(weights: Weights, img: torch.Tensor, img_ids: torch.Tensor, txt: torch.Tensor, txt_ids: torch.Tensor,
         timestep: torch.Tensor, qk_eps: float = _NORM_EPS, axes: Sequence[int] = ROPE_AXES,
         theta: float = ROPE_THETA, after_block: Callable[[], object] = lambda: None) -> torch.Tensor:
    """One prediction ``(B, L_img, out channels)``, between torch tensors.

    ``img`` ``(B, L_img, in channels)``: image tokens, reference tokens behind them. ``txt`` ``(B, L_txt, width)``.
    ``img_ids``, ``txt_ids`` ``(L, len(axes))``: the positions, the same for the whole batch. ``timestep`` ``(B,)``
    from 0 to 1. ``qk_eps`` is that of the query and key norms. See :func:`forward` for ``after_block``.
    """
    ids = torch.cat((txt_ids, img_ids))
    tensors = [img, txt.to(img.dtype), time_embedding(timestep).to(img.dtype), *rotary_tables(ids, axes, theta)]
    x, text, time, cos, sin = arrays.to_mlx(tensors)
    return arrays.to_torch(forward(Net(weights, cos, sin, qk_eps), x, text, time, after_block), img)


class Net(NamedTuple):
    """What every block needs: the weights, the rotary tables, and the eps of the query and key norms."""

    weights: Weights
    cos: mx.array
    sin: mx.array
    qk_eps: float

    def linear(self, x: mx.array, name: str) -> mx.array:
        """``x @ W.T`` with the weight of layer ``name``."""
        return arrays.product(x, self.weights[f"{name}.weight"])

    def heads(self, qkv: mx.array, norm: str) -> list[mx.array]:
        """Queries and keys (normalised) and values, each ``(B, heads, L, D)``, of fused ``(B, L, 3 * hidden)``."""
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, -1, 2 * self.cos.shape[-1]).transpose(2, 0, 3, 1, 4)
        return [_rms_norm(q, self.weights[f"{norm}.query_norm.weight"], self.qk_eps),
                _rms_norm(k, self.weights[f"{norm}.key_norm.weight"], self.qk_eps), v]

    def attention(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """``(B, heads, L, D)`` -> ``(B, L, hidden)``, queries and keys rotated in float32."""
        q, k = (_rotate(x, self.cos, self.sin) for x in (q, k))
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return attended.transpose(0, 2, 1, 3).flatten(2)


def forward(net: Net, img: mx.array, txt: mx.array, time: mx.array, after_block: Callable[[], object]) -> mx.array:
    """The transformer on arrays (see :func:`step`); ``time`` is the embedding of the timestep.

    Each block is evaluated on its own, which bounds the memory in flight. ``after_block`` is called after each: a host
    cancels from there.
    """
    condition = _silu(net.linear(_silu(net.linear(time, "time_in.in_layer")), "time_in.out_layer"))[:, None]
    img, txt = net.linear(img, "img_in"), net.linear(txt, "txt_in")

    mods = [mx.split(net.linear(condition, f"double_stream_modulation_{stream}.lin"), 6, axis=-1)
            for stream in ("img", "txt")]
    doubles, singles = count_blocks(net.weights)
    for i in range(doubles):
        img, txt = double_block(net, f"double_blocks.{i}", img, txt, *mods)
        mx.eval(img, txt)
        after_block()

    x = mx.concatenate((txt, _finite(img)), axis=1)
    mod = mx.split(net.linear(condition, "single_stream_modulation.lin"), 3, axis=-1)
    for i in range(singles):
        x = single_block(net, f"single_blocks.{i}", x, mod)
        mx.eval(x)
        after_block()

    shift, scale = mx.split(net.linear(condition, "final_layer.adaLN_modulation.1"), 2, axis=-1)
    return net.linear(_modulate(x[:, txt.shape[1]:], shift, scale), "final_layer.linear")


def double_block(net: Net, block: str, img: mx.array, txt: mx.array, img_mod: Sequence[mx.array],
                 txt_mod: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """One double-stream block: image and text have weights of their own and attend together.

    ``img_mod`` and ``txt_mod`` are shift, scale and gate of the attention and of the MLP.
    """
    def heads(x: mx.array, stream: str, shift: mx.array, scale: mx.array) -> list[mx.array]:
        qkv = net.linear(_modulate(x, shift, scale), f"{block}.{stream}_attn.qkv")
        return net.heads(qkv, f"{block}.{stream}_attn.norm")

    def update(x: mx.array, stream: str, attended: mx.array, mod: Sequence[mx.array]) -> mx.array:
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
        x = x + gate * net.linear(attended, f"{block}.{stream}_attn.proj")
        inner = _gated(net.linear(_modulate(x, mlp_shift, mlp_scale), f"{block}.{stream}_mlp.0"))
        return x + mlp_gate * net.linear(inner, f"{block}.{stream}_mlp.2")

    pairs = zip(heads(txt, "txt", *txt_mod[:2]), heads(img, "img", *img_mod[:2]), strict=True)
    attended = net.attention(*(mx.concatenate(pair, axis=2) for pair in pairs))
    txt_attended, img_attended = mx.split(attended, [txt.shape[1]], axis=1)
    return update(img, "img", img_attended, img_mod), _finite(update(txt, "txt", txt_attended, txt_mod))


def single_block(net: Net, block: str, x: mx.array, mod: Sequence[mx.array]) -> mx.array:
    """One single-stream block: text and image in one sequence, attention and MLP side by side."""
    shift, scale, gate = mod
    fused = net.linear(_modulate(x, shift, scale), f"{block}.linear1")
    qkv, mlp = mx.split(fused, [3 * x.shape[-1]], axis=-1)
    attended = net.attention(*net.heads(qkv, f"{block}.norm"))
    return _finite(x + gate * net.linear(mx.concatenate((attended, _gated(mlp)), axis=-1), f"{block}.linear2"))


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _gated(x: mx.array) -> mx.array:
    gate, value = mx.split(x, 2, axis=-1)
    return _silu(gate) * value


def _modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, None, None, _NORM_EPS) * (1 + scale) + shift


def _rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight.astype(x.dtype), eps)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return mx.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape).astype(x.dtype)


def _finite(x: mx.array) -> mx.array:
    """FP16 overflows in this model; ComfyUI and diffusers clamp it at the same places."""
    return mx.nan_to_num(x, 0.0, _FP16_MAX, -_FP16_MAX) if x.dtype == mx.float16 else x
