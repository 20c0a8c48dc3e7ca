"""The error of int8 activations (``precision: fast``) on random miniature models, per layer and on the final latent.

    python benchmarks/int8_error.py

Plain torch on the CPU, by ``ops/int8_reference.py``, which the Triton kernel equals (``tests/test_triton.py``). Random
models have no outlying activations: a trained one will show more.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from bonsai_image.loaders import Transformer
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.ops import int8_reference
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.standalone import models, random_pack

STEPS, SIDE, TOKENS, TEXT_WIDTH = 4, 8, 32, 384


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


def round_activations(module: torch.nn.Module, errors: list[float]) -> None:
    """Make every packed layer of ``module`` compute with int8 activations, and note its error on what it is given."""
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            def forward(x, layer=layer, exact=layer.forward):
                params = layer.weight._params
                rounded = int8_reference.fast(x.flatten(0, -2), layer.weight._qdata, params.scale, params.bits)
                expected = exact(x).flatten(0, -2)
                errors.append(float((rounded - expected).norm() / expected.norm()))
                return rounded.view(*x.shape[:-1], -1)

            layer.forward = forward


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'model':<9}{'width':>6}{'blocks':>8}{'layer min':>11}{'median':>8}{'max':>8}{'latent':>8}")
    for variant, bits in (("ternary", 2), ("binary", 1)):
        for hidden, double, single in ((256, 1, 2), (512, 2, 6)):
            config = KleinConfig(hidden, TEXT_WIDTH, 128, 128, double, single)
            tensors = random_pack.random_transformer(config, bits, torch.Generator().manual_seed(0))
            module = models.transformer_module(Transformer(Path("random"), "random", tensors, config),
                                               torch.device("cpu"), torch.float32)
            exact, errors = sample(module, 1), []
            round_activations(module, errors)
            latent = float((sample(module, 1) - exact).norm() / exact.norm())
            errors.sort()
            print(f"{variant:<9}{hidden:>6}{f'{double}+{single}':>8}{errors[0]:>11.4f}{errors[len(errors) // 2]:>8.4f}"
                  f"{errors[-1]:>8.4f}{latent:>8.4f}")


if __name__ == "__main__":
    main()
