"""The error of int8 activations, layer by layer and in the final latent, beside other ways to multiply fewer bits.

    python benchmarks/int8_error.py

Plain torch on the CPU, by ``ops/backends/interface.py``, which every kernel equals (``tests/test_cpu.py``,
``tests/test_triton.py``). The first table is one layer, with outlying activations as trained transformers have them: a
few columns many times as large as the rest. The second is random miniature models, which have none of themselves; with
``x30`` the four largest columns of what each layer is given are 30 times as large, and its weight there 30 times as
small: the same model.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from bonsai_image.loaders import Transformer
from bonsai_image.loaders.klein import KleinConfig
from bonsai_image.ops.backends.interface import int8_product, quantize
from bonsai_image.ops.linear import PackedLinear
from bonsai_image.ops.packed import Packed, dequantize, pack_codes, unwrap
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


def by_row(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to int8 with one scale a row."""
    high, _, step = quantize(x, x.shape[1], 1)
    return high.float() * (128 * step)


def int8_by_row(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Int8 activations with one scale a row, on the exact weight."""
    return by_row(x) @ dequantize(packed, torch.float32).t()


def folded_int8(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Activations and weight in int8 with one scale a row, into which the scales of the groups are folded: what an
    ordinary int8 product computes. It rounds the weight."""
    return by_row(x) @ by_row(dequantize(packed, torch.float32)).t()


def bfloat16(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """What BF16 does: activations and result rounded."""
    return (x.bfloat16().float() @ dequantize(packed, torch.float32).t()).bfloat16().float()


WAYS: dict[str, Product] = {
    "bf16": bfloat16, "two digits": functools.partial(int8_product, digits=2),
    "adaptive": functools.partial(int8_product, digits="adaptive"),
    "one digit": functools.partial(int8_product, digits=1), "int8 by row": int8_by_row, "fp8 1x128": fp8_blocks,
    "int8 folded": folded_int8}
#: Columns, and how many times as large as the rest.
OUTLIERS = ((0, 1), (4, 10), (4, 30), (4, 300), (4, 3000), (20, 30), (60, 10), (300, 5))


def one_layer() -> None:
    """The error of a ternary product of 256 x 3072 x 1024 against float64, for Gaussian activations with outliers."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (1024, 3072), generator=generator, dtype=torch.uint8)
    packed = Packed(pack_codes(codes, 2), torch.rand(1024, 24, generator=generator) + 0.5, None, 2, "symmetric")
    print(f"{'outlying columns':<18}" + "".join(f"{way:>12}" for way in WAYS) + f"{'second in':>12}")
    for columns, factor in OUTLIERS:
        x = torch.randn(256, 3072, generator=generator)
        x[:, torch.randperm(3072, generator=generator)[:columns]] *= factor
        exact = x.double() @ dequantize(packed, torch.float64).t()
        errors = [float((product(x, packed).double() - exact).norm() / exact.norm()) for product in WAYS.values()]
        second = quantize(x, 128, "adaptive")[1].view(32, 8, 24, 128).ne(0).any(3).any(1).float().mean()
        print(f"{f'{columns} x{factor}':<18}" + "".join(f"{error:>12.1e}" for error in errors)
              + f"{float(second):>11.0%}", flush=True)


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


def round_activations(module: torch.nn.Module, errors: list[float], product: Product, factor: int = 1) -> None:
    """Make every packed layer of ``module`` compute by ``product``, and note its error on what it is given, with four
    columns ``factor`` times as large and the weight made for it."""
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            def forward(x, layer=layer, exact=layer.forward):
                rows = x.flatten(0, -2)
                rounded = product(rows, unwrap(layer.weight)) if factor == 1 else outlying(rows, layer, product, factor)
                expected = exact(x).flatten(0, -2)
                errors.append(float((rounded - expected).norm() / expected.norm()))
                return rounded.view(*x.shape[:-1], -1)

            layer.forward = forward


def outlying(x: torch.Tensor, layer: PackedLinear, product: Product, factor: int) -> torch.Tensor:
    """``product`` of ``x`` with its four largest columns ``factor`` times as large, less what they add too much."""
    columns = x.abs().amax(0).topk(4).indices
    more = (factor - 1) * x[:, columns]
    larger = x.index_copy(1, columns, x[:, columns] + more)
    weight = dequantize(unwrap(layer.weight), torch.float32)
    return product(larger, unwrap(layer.weight)) - more @ weight[:, columns].t()


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    one_layer()
    print(f"\n{'model':<9}{'width':>6}{'blocks':>8}  {'activations':<18}{'layer min':>10}{'median':>9}{'max':>9}"
          f"{'latent':>9}")
    for variant, bits in (("ternary", 2), ("binary", 1)):
        for hidden, double, single in ((256, 1, 2), (512, 2, 6)):
            config = KleinConfig(num_attention_heads=hidden // 128, joint_attention_dim=TEXT_WIDTH, in_channels=128,
                                 num_layers=double, num_single_layers=single)
            tensors = random_model.random_transformer(config, bits, torch.Generator().manual_seed(0))
            model = Transformer(Path("random"), "random", tensors, config)
            exact = sample(models.transformer_module(model, torch.device("cpu"), torch.float32), 1)
            for way, product in WAYS.items():
                for factor in (1, 30):
                    module, errors = models.transformer_module(model, torch.device("cpu"), torch.float32), []
                    round_activations(module, errors, product, factor)
                    latent = float((sample(module, 1) - exact).norm() / exact.norm())
                    errors.sort()
                    name = f"{way} x{factor}"
                    print(f"{variant:<9}{hidden:>6}{f'{double}+{single}':>8}  {name:<18}{errors[0]:>10.5f}"
                          f"{errors[len(errors) // 2]:>9.5f}{errors[-1]:>9.5f}{latent:>9.5f}", flush=True)


if __name__ == "__main__":
    main()
