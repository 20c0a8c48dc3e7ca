"""The error of int8 activations (``precision: fast``) on random miniature models, per layer and on the final latent,
beside the two other ways in which cards multiply fewer bits.

    python benchmarks/int8_error.py

Plain torch on the CPU, by ``ops/backends/interface.py``, which the Triton kernel equals (``tests/test_triton.py``).
Random models have no outlying activations: a trained one will show more.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from bonsai_image.loaders import Transformer
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.ops.backends.interface import int8_reference, quantise_rows
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.ops.packed import Packed, dequantize, parts
from bonsai_image.standalone import models
from bonsai_image.tests.support import random_model

STEPS, SIDE, TOKENS, TEXT_WIDTH = 4, 8, 32, 384
_BLOCK = 128
#: Activations and weight to their product.
Product = Callable[[torch.Tensor, Packed], torch.Tensor]


def fp8_blocks(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Activations in FP8 (e4m3), scaled by row and block of 128, on the exact weight: what ``F.scaled_mm`` computes
    with 1x128 blocks."""
    blocks = x.float().unflatten(1, (-1, _BLOCK))
    step = blocks.abs().amax(2, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    rounded = ((blocks / step).to(torch.float8_e4m3fn).float() * step).flatten(1)
    return rounded @ dequantize(packed, torch.float32).t()


def folded_int8(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Activations and weight in int8 with one scale a row, into which the scales of the groups are folded: what an
    ordinary int8 product computes. It rounds the weight."""
    q, row = quantise_rows(x)
    weight = dequantize(packed, torch.float32)
    levels, column = quantise_rows(weight)
    return (q.double() @ levels.double().t()).float() * row[:, None] * column


WAYS: dict[str, Product] = {"int8": int8_reference, "fp8 1x128": fp8_blocks, "int8 folded": folded_int8}


def sample(module: torch.nn.Module, seed: int) -> torch.Tensor:
    """The latent after 4 Euler steps from noise, on a linear schedule."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, TOKENS, TEXT_WIDTH, generator=generator)
    latent = torch.randn(1, SIDE * SIDE, 128, generator=generator)
    one, side = torch.arange(1), torch.arange(SIDE)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for now, after in itertools.pairwise(sigmas):
        velocity = module(hidden_states=latent, encoder_hidden_states=text, timestep=now[None], guidance=None,
                          img_ids=torch.cartesian_prod(one, side, side, one)[None],
                          txt_ids=torch.cartesian_prod(one, one, one, torch.arange(TOKENS))[None],
                          return_dict=False)[0]
        latent = latent + (after - now) * velocity
    return latent


def round_activations(module: torch.nn.Module, errors: list[float], product: Product = int8_reference) -> None:
    """Make every packed layer of ``module`` compute by ``product``, and note its error on what it is given."""
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            def forward(x, layer=layer, exact=layer.forward):
                rounded = product(x.flatten(0, -2), parts(layer.weight))
                expected = exact(x).flatten(0, -2)
                errors.append(float((rounded - expected).norm() / expected.norm()))
                return rounded.view(*x.shape[:-1], -1)

            layer.forward = forward


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'model':<9}{'width':>6}{'blocks':>8}  {'activations':<12}{'layer min':>10}{'median':>8}{'max':>8}"
          f"{'latent':>8}")
    for variant, bits in (("ternary", 2), ("binary", 1)):
        for hidden, double, single in ((256, 1, 2), (512, 2, 6)):
            config = KleinConfig(hidden // 128, TEXT_WIDTH, 128, 128, double, single)
            tensors = random_model.random_transformer(config, bits, torch.Generator().manual_seed(0))
            model = Transformer(Path("random"), "random", tensors, config)
            exact = sample(models.transformer_module(model, torch.device("cpu"), torch.float32), 1)
            for way, product in WAYS.items():
                module, errors = models.transformer_module(model, torch.device("cpu"), torch.float32), []
                round_activations(module, errors, product)
                latent = float((sample(module, 1) - exact).norm() / exact.norm())
                errors.sort()
                print(f"{variant:<9}{hidden:>6}{f'{double}+{single}':>8}  {way:<12}{errors[0]:>10.4f}"
                      f"{errors[len(errors) // 2]:>8.4f}{errors[-1]:>8.4f}{latent:>8.4f}", flush=True)


if __name__ == "__main__":
    main()
