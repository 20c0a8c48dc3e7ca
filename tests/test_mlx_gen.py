"""mlx-gen, another program for Macs, reads a whole repository that ``convert --to mlx`` wrote, and computes our step.

On a CPU two of its Metal kernels, the norm and rotation of q and k, are replaced by plain MLX; its VAE has fixed sizes
and is not run.
"""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bonsai_image.loaders import load_text_encoder, load_transformer
from bonsai_image.loaders.formats import mlx as mlx_format
from bonsai_image.ops.backends import Setting
from bonsai_image.standalone.models import transformer_module
from bonsai_image.tests.support.command_line import MINIATURE, run
from bonsai_image.tests.support.reference import relative

pytestmark = [pytest.mark.mlx_gen, pytest.mark.skipif(
    importlib.util.find_spec("mflux") is None, reason="mlx-gen is not installed: pip install mlx-gen 'pillow<12.3'")]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlx-gen") / "bonsai"
    assert run("convert", MINIATURE / "ternary", path, "--to", "mlx") == 0
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    """Tokenizer and text encoder by mlx-gen's own loader; what it caches stays in the folder of the test."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    os.environ.setdefault("MFLUX_CACHE_DIR", str(folder.parent))
    from mflux.models.bonsai_image.bonsai_image_initializer import BonsaiImageInitializer as Loader

    model = SimpleNamespace(text_encoder=Loader._new_text_encoder(folder))
    Loader._init_tokenizers(model, str(folder))
    Loader._load_text_encoder(model, folder)
    return model


def _norm_and_rotate(x, weight, cos, sin, eps, dtype):
    """x (B, S, H, D) -> (B, H, S, D): RMS norm, then pairs of neighbours turned by cos and sin (S, D / 2)."""
    import mlx.core as mx

    x = x.astype(mx.float32)
    x = x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(mx.float32)
    cos, sin = (t.astype(mx.float32).reshape(t.shape[0], -1)[None, :, None, :] for t in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = mx.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)
    return turned.transpose(0, 2, 1, 3).astype(dtype)


def _qkv(spec, fused, norm_q, norm_k, cos, sin):
    width = spec.num_heads * spec.head_dim
    q, k, v = (fused[..., i * width : (i + 1) * width].reshape(*fused.shape[:2], spec.num_heads, spec.head_dim)
               for i in range(3))
    turned = (_norm_and_rotate(x, norm, cos, sin, spec.rms_norm_eps, fused.dtype) for x, norm in (
        (q, norm_q), (k, norm_k)))
    return *turned, v.transpose(0, 2, 1, 3)


def _double_kernel(spec, img_seq, txt_seq):
    import mlx.core as mx

    def kernel(inputs, **_):
        img, txt, norm_q, norm_k, norm_added_q, norm_added_k, cos, sin = inputs
        text = _qkv(spec, txt, norm_added_q, norm_added_k, cos[:txt_seq], sin[:txt_seq])
        image = _qkv(spec, img, norm_q, norm_k, cos[txt_seq:], sin[txt_seq:])
        return tuple(mx.concatenate(pair, axis=2) for pair in zip(text, image, strict=True))

    return kernel


def _single_kernel(spec, seq_len):
    return lambda inputs, **_: _qkv(spec, *inputs)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1), ("bfloat16", 4)])
@torch.inference_mode()
def test_a_step_is_ours(folder, dtype, limit, monkeypatch):
    """Within ``limit`` times what our BF16 costs. mlx-gen computes in BF16; with FP32 where its code takes it, it is
    nearer to our FP32 than our BF16 is."""
    import mlx.core as mx
    from mflux.models.bonsai_image.bonsai_image_initializer import BonsaiImageInitializer as Loader
    from mflux.models.common.config import ModelConfig
    from mflux.models.flux2.model.flux2_transformer.klein_fast import blocks

    monkeypatch.setattr(blocks, "_get_fused_double_norm_rope_kernel", _double_kernel)
    monkeypatch.setattr(blocks, "_get_fused_single_norm_rope_kernel", _single_kernel)
    monkeypatch.setattr(ModelConfig, "precision", getattr(mx, dtype))
    theirs = SimpleNamespace()
    Loader._load_packed_transformer(theirs, folder)
    model, generator = load_transformer(folder), torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, model.config.in_channels, generator=generator)
    text = torch.randn(1, 32, model.config.joint_attention_dim, generator=generator)
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), torch.zeros(1))
    text_ids = torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(32.0))
    time = torch.tensor([0.5])

    def ours(dtype):
        module = transformer_module(model, CPU, dtype, Setting("torch"))
        return module(hidden_states=x.to(dtype), encoder_hidden_states=text.to(dtype), timestep=time,
                      img_ids=image_ids, txt_ids=text_ids, return_dict=False)[0].float()

    given = (mx.array(tensor.numpy()).astype(ModelConfig.precision) for tensor in (x, text, time))
    out = theirs.transformer(*given, mx.array(image_ids.numpy()), mx.array(text_ids.numpy()))
    exact = ours(torch.float32)
    found = relative(torch.from_numpy(np.array(out.astype(mx.float32))), exact)
    rounded = relative(ours(torch.bfloat16), exact)
    print(f"relative difference to our FP32: mlx-gen in {dtype} {found:.1e}, our BF16 {rounded:.1e}")
    assert found < limit * rounded


def test_the_text_encoder_has_our_words(folder, theirs):
    from mlx.utils import tree_flatten

    found = dict(tree_flatten(theirs.text_encoder.parameters()))
    for name, tensor in mlx_format.encode(load_text_encoder(folder).tensors).items():
        other = found[name.removeprefix("model.")]
        if tensor.dtype == torch.uint32:
            assert np.array_equal(np.array(other), tensor.numpy()), name


def test_its_tokenizer_is_ours(theirs):
    assert theirs.tokenizers["qwen3"]
