"""What a MODEL is made of, as text."""

from __future__ import annotations

from collections import Counter

from ..loaders.names import is_packable
from ..ops import backends
from ..ops.packed import is_packed, packed_nbytes
from .models import ATTACHMENT, MLX_ATTACHMENT, Origin


def describe(patcher) -> str:
    """Variant, source, compute dtype, backend per kind of layer, bytes packed and dense, patches of a MODEL."""
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    packed = {name: p for name, p in parameters.items() if is_packed(p)}
    dense = {name: p for name, p in parameters.items() if not is_packed(p)}
    origin: Origin | None = patcher.get_attachment(ATTACHMENT)
    lines = []
    if origin is None:
        lines.append("Not loaded by a Bonsai node.")
    else:
        lines += [f"Bonsai Image 4B, {origin.variant}", f"source: {origin.source}", f"file: {origin.path}",
                  f"format: {origin.format}", f"compute dtype: {origin.compute_dtype}"]
    backend = backends.resolve(origin.backend if origin else "auto", patcher.load_device)
    kinds = Counter((p._params.bits, p._params.group) for p in packed.values())
    lines += [f"packed: {count} linears of {bits} bits in groups of {group}, backend {backend}"
              for (bits, group), count in sorted(kinds.items())]
    path = patcher.get_attachment(MLX_ATTACHMENT)
    if path is not None:
        lines.append(f"path: {path.describe(patcher)}")
    lines.append(f"dense: {sum(not is_packable(name) and p.ndim == 2 for name, p in dense.items())} linears, "
                 f"backend torch")
    lines.append(f"bytes: {sum(map(packed_nbytes, packed.values())):,} packed, "
                 f"{sum(p.nbytes for p in dense.values()):,} dense")
    lines.append(f"device: {patcher.load_device}, patches on {len(patcher.patches)} weights")
    return "\n".join(lines)
