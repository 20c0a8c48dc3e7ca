"""Adapter files of every kind, for some layers of the small model, and what the tests ask of a patched MODEL."""

import torch

from bonsai_image.ops.packed import PackedLayout, is_packed

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1",
          "single_blocks.1.linear2", "img_in")


class Maker:
    """Adapter files of every kind, random but of a visible effect."""

    def __init__(self, tensors=None, seed=0):
        self.shapes = {layer: tuple(tensors[f"{layer}.weight"].shape) for layer in LAYERS if tensors}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def file(self, kind: str) -> dict[str, torch.Tensor]:
        result = {}
        for layer, (n, k) in self.shapes.items():
            parts = getattr(self, kind)(n, k)
            result |= {f"diffusion_model.{layer}.{name}": tensor for name, tensor in parts.items()}
        return result

    def lora(self, n, k, rank=4):
        return {"lora_up.weight": self.random(n, rank), "lora_down.weight": self.random(rank, k, scale=0.03),
                "alpha": torch.tensor(2.0)}

    def lora_without_alpha(self, n, k):
        return {"lora_B.weight": self.random(n, 3, scale=0.5), "lora_A.weight": self.random(3, k, scale=0.03)}

    def locon(self, n, k):
        parts = self.lora(n, k)
        return {name: tensor[..., None, None] if tensor.ndim == 2 else tensor for name, tensor in parts.items()}

    def dora(self, n, k):
        return {**self.lora(n, k), "dora_scale": self.random(n, 1).abs() + 0.5}

    def dora_on_the_input_axis(self, n, k):
        return {**self.lora(n, k), "dora_scale": self.random(1, k).abs() + 0.5}

    def loha(self, n, k):
        return {"hada_w1_a": self.random(n, 3), "hada_w1_b": self.random(3, k, scale=0.2),
                "hada_w2_a": self.random(n, 3), "hada_w2_b": self.random(3, k, scale=0.2), "alpha": torch.tensor(1.5)}

    def lokr(self, n, k):
        return {"lokr_w1": self.random(4, 8, scale=0.3), "lokr_w2": self.random(n // 4, k // 8, scale=0.2)}

    def lokr_decomposed(self, n, k):
        return {"lokr_w1": self.random(4, 8, scale=0.3), "lokr_w2_a": self.random(n // 4, 2, scale=0.3),
                "lokr_w2_b": self.random(2, k // 8, scale=0.3), "alpha": torch.tensor(1.0)}

    def lokr_of_two_ranks(self, n, k):
        return {"lokr_w1_a": self.random(4, 3, scale=0.3), "lokr_w1_b": self.random(3, 8),
                "lokr_w2_a": self.random(n // 4, 2, scale=0.3), "lokr_w2_b": self.random(2, k // 8, scale=0.3),
                "alpha": torch.tensor(1.0)}

    def glora(self, n, k):
        return {"a1.weight": self.random(3, k, scale=0.1), "a2.weight": self.random(k, 3, scale=0.1),
                "b1.weight": self.random(3, k, scale=0.1), "b2.weight": self.random(n, 3), "alpha": torch.tensor(3.0)}

    def oft(self, n, k):
        return {"oft_blocks": self.random(8, n // 8, n // 8, scale=0.02), "alpha": torch.tensor(0.5)}

    def boft(self, n, k):
        return {"oft_blocks": self.random(2, 8, n // 8, n // 8, scale=0.02), "alpha": torch.tensor(0.5)}

    def diff(self, n, k):
        return {"diff": self.random(n, k, scale=0.02)}

KINDS = [name for name in vars(Maker) if not name.startswith("_") and name not in ("random", "file")]

#: Kinds that stay in factored form, without a dense copy of the layer.
FACTORED = {"lora", "lora_without_alpha", "locon", "lokr", "lokr_decomposed"}


def with_lora(model, file, strength=1.0):
    import comfy.sd

    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(file), strength, 0.0)
    return patched


def codes_of(model):
    return [part.clone() for p in model.model.diffusion_model.parameters() if is_packed(p)
            for part in PackedLayout.get_plain_tensors(p)]
