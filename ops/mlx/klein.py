"""The whole FLUX.2 Klein transformer in MLX, as a function of its weights. Importing this imports MLX.

Weights go by ComfyUI's names (``loaders/names.py``). A step crosses between torch and MLX twice: the inputs together
on the way in, the prediction on the way out. Everything in between stays in MLX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import torch

from ..packed import is_packed, parts
from . import arrays
from .arrays import PackedArrays, product

Weights = dict[str, PackedArrays | mx.array]

_HEAD_DIM = 128
_NORM_EPS = 1e-6
#: The timestep goes into 256 sinusoids with periods from 1 to 10,000, in thousandths (BFL's flux2, ``model.py``).
_TIME_CHANNELS, _TIME_PERIOD, _TIME_FACTOR = 256, 10000, 1000.0
ROPE_AXES, ROPE_THETA = (32, 32, 32, 32), 2000
_FP16_MAX = 65504.0


def load(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Weights:
    """The weights of one model in MLX, evaluated, for activations of ``dtype``."""
    weights = [parts(tensor) if is_packed(tensor) else tensor for tensor in tensors.values()]
    return dict(zip(tensors, arrays.weight_arrays(weights, dtype), strict=True))


def rotary_tables(ids: torch.Tensor, axes: Sequence[int] = ROPE_AXES,
                  theta: float = ROPE_THETA) -> tuple[torch.Tensor, torch.Tensor]:
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
         theta: float = ROPE_THETA, after_block: Callable[[], None] | None = None) -> torch.Tensor:
    """One prediction ``(B, L_img, out channels)``, between torch tensors.

    ``img`` ``(B, L_img, in channels)``: image tokens, reference tokens behind them. ``txt`` ``(B, L_txt, width)``.
    ``img_ids``, ``txt_ids`` ``(L, len(axes))``: the positions, the same for the whole batch. ``timestep`` ``(B,)``
    from 0 to 1. ``qk_eps`` is that of the query and key norms. See :func:`forward` for ``after_block``.
    """
    cos, sin = rotary_tables(torch.cat((txt_ids, img_ids)), axes, theta)
    inputs = arrays.to_mlx([img, txt.to(img.dtype), time_embedding(timestep).to(img.dtype), cos, sin])
    return arrays.to_torch(forward(weights, *inputs, qk_eps, after_block), img)


def forward(weights: Weights, img: mx.array, txt: mx.array, time: mx.array, cos: mx.array, sin: mx.array,
            qk_eps: float, after_block: Callable[[], None] | None) -> mx.array:
    """The transformer on arrays (see :func:`step`); ``time``, ``cos`` and ``sin`` are the tables above.

    Each block is evaluated on its own, which bounds the memory in flight, and then ``after_block`` is called: a host
    cancels from there.
    """
    def linear(x: mx.array, name: str) -> mx.array:
        return product(x, weights[f"{name}.weight"])

    def modulation(name: str, count: int) -> list[mx.array]:
        return mx.split(linear(_silu(vec)[:, None], name), count, axis=-1)

    def heads(qkv: mx.array, norm: str) -> list[mx.array]:
        """Queries and keys (normalised) and values, each ``(B, heads, L, 128)``, of fused ``(B, L, 3 * hidden)``."""
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, -1, _HEAD_DIM).transpose(2, 0, 3, 1, 4)
        return [_rms_norm(q, weights[f"{norm}.query_norm.weight"], qk_eps),
                _rms_norm(k, weights[f"{norm}.key_norm.weight"], qk_eps), v]

    def after_attention(stream: str, x: mx.array, attended: mx.array, mod: list[mx.array]) -> mx.array:
        """The rest of a double-stream block for one stream."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
        x = x + gate * linear(attended, f"{stream}_attn.proj")
        inner = _gated(linear(_modulate(x, mlp_shift, mlp_scale), f"{stream}_mlp.0"))
        return x + mlp_gate * linear(inner, f"{stream}_mlp.2")

    def finish(*states: mx.array) -> None:
        mx.eval(states)
        if after_block is not None:
            after_block()

    vec = linear(_silu(linear(time, "time_in.in_layer")), "time_in.out_layer")
    img, txt = linear(img, "img_in"), linear(txt, "txt_in")
    text = txt.shape[1]

    img_mod = modulation("double_stream_modulation_img.lin", 6)
    txt_mod = modulation("double_stream_modulation_txt.lin", 6)
    for block in _blocks(weights, "double_blocks"):
        fused = [heads(linear(_modulate(x, shift, scale), f"{block}.{stream}_attn.qkv"), f"{block}.{stream}_attn.norm")
                 for stream, x, (shift, scale, *_) in (("txt", txt, txt_mod), ("img", img, img_mod))]
        q, k, v = (mx.concatenate(pair, axis=2) for pair in zip(*fused, strict=True))
        attended = _attention(q, k, v, cos, sin)
        txt = _finite(after_attention(f"{block}.txt", txt, attended[:, :text], txt_mod))
        img = after_attention(f"{block}.img", img, attended[:, text:], img_mod)
        finish(txt, img)

    x = mx.concatenate((txt, _finite(img)), axis=1)
    shift, scale, gate = modulation("single_stream_modulation.lin", 3)
    hidden = x.shape[-1]
    for block in _blocks(weights, "single_blocks"):
        fused = linear(_modulate(x, shift, scale), f"{block}.linear1")
        qkv, mlp = mx.split(fused, [3 * hidden], axis=-1)
        attended = _attention(*heads(qkv, f"{block}.norm"), cos, sin)
        x = _finite(x + gate * linear(mx.concatenate((attended, _gated(mlp)), axis=-1), f"{block}.linear2"))
        finish(x)

    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)
    return linear(_modulate(x[:, text:], shift, scale), "final_layer.linear")


def _blocks(weights: Weights, kind: str) -> list[str]:
    numbers = {int(match[1]) for name in weights if (match := re.match(rf"{kind}\.(\d+)\.", name))}
    return [f"{kind}.{i}" for i in sorted(numbers)]


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _gated(x: mx.array) -> mx.array:
    gate, value = mx.split(x, 2, axis=-1)
    return _silu(gate) * value


def _modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, None, None, _NORM_EPS) * (1 + scale) + shift


def _rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight.astype(x.dtype), eps)


def _attention(q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """``(B, heads, L, 128)`` -> ``(B, L, hidden)``, queries and keys rotated in float32."""
    attended = mx.fast.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v,
                                                    scale=_HEAD_DIM**-0.5)
    return attended.transpose(0, 2, 1, 3).flatten(2)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return mx.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape).astype(x.dtype)


def _finite(x: mx.array) -> mx.array:
    """FP16 overflows in this model; the hosts clamp it at the same places."""
    return mx.nan_to_num(x, 0.0, _FP16_MAX, -_FP16_MAX) if x.dtype == mx.float16 else x
