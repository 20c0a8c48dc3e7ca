"""One resumable training stage: Muon for matrices, AdamW for the rest, a linear warm-up and decay, checkpoints, losses.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

_SAVE_EVERY = 100
_COLOURS = ("#1b6f4a", "#c2452d", "#2f5fb3", "#9a6b1f", "#6b3fa0", "#444444", "#b03a83")


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz steps (Jordan et al., Muon, 2024)."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; kernels of convolutions count as matrices."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                rows, columns = update.shape
                parameter.add_(orthogonalised(update).view_as(parameter),
                               alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _optimizers(module: torch.nn.Module, is_matrix: Callable[[str, torch.Tensor], bool],
                lr: tuple[float, float]) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its learning rate."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if parameter.ndim >= 2 and is_matrix(name, parameter)]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for _, parameter in named if id(parameter) not in known]
    result = [(Muon(matrices, lr[0]), lr[0])] if matrices else []
    return [*result, (torch.optim.AdamW(others, lr[1], betas=(0.9, 0.95), weight_decay=0.0), lr[1])]


def train(folder: Path, name: str, module: torch.nn.Module, loss: Callable[[int], torch.Tensor], steps: int,
          lr: tuple[float, float], is_matrix: Callable[[str, torch.Tensor], bool]) -> None:
    """Train ``module`` in place on ``loss(step)``, or load what an earlier run left in ``folder``.

    ``lr``: of Muon and of AdamW. What a step draws by chance follows from ``name`` and the step alone, so a
    resumed run goes on as the unbroken one would.
    """
    done, part = folder / f"{name}.pt", folder / f"{name}.part.pt"
    if done.exists():
        module.load_state_dict(torch.load(done, weights_only=True))
        return
    optimizers = _optimizers(module, is_matrix, lr)
    losses, first, seconds = [], 0, 0.0
    if part.exists():
        state = torch.load(part, weights_only=True)
        module.load_state_dict(state["module"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        losses, first, seconds = state["losses"], state["step"], state["seconds"]
    start = time.perf_counter() - seconds
    with tqdm(range(first, steps), name, initial=first, total=steps, mininterval=5) as bar:
        for step in bar:
            torch.manual_seed(zlib.crc32(f"0/{name}/{step}".encode()))
            factor = min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.6 * steps))
            for optimizer, base in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = base * factor
            module.zero_grad(set_to_none=True)
            value = loss(step)
            value.backward()
            for optimizer, _ in optimizers:
                optimizer.step()
            losses.append(value.item())
            if step % 10 == 9:
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
            if step % _SAVE_EVERY == _SAVE_EVERY - 1:
                save({"module": module.state_dict(), "optimizers": [o.state_dict() for o, _ in optimizers],
                      "losses": losses, "step": step + 1, "seconds": time.perf_counter() - start}, part)
    (folder / f"{name}.json").write_text(json.dumps({"seconds": time.perf_counter() - start, "losses": losses}))
    save(module.state_dict(), done)
    part.unlink(missing_ok=True)


def save(value: dict, path: Path) -> None:
    """``torch.save`` that leaves no half a file when it is interrupted."""
    scratch = path.with_suffix(".tmp")
    torch.save(value, scratch)
    scratch.replace(path)


def loss_picture(folder: Path, names: Iterable[str], path: Path) -> None:
    """Every stage's loss over its steps, smoothed over 1/50 of them, each between its own largest and smallest."""
    width, height, margin = 900, 420, 30
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for row, (name, colour) in enumerate(zip(names, _COLOURS, strict=True)):
        record = json.loads((folder / f"{name}.json").read_text())
        losses = torch.tensor(record["losses"])
        window = max(1, len(losses) // 50)
        smooth = losses.unfold(0, window, 1).mean(1).log()
        low, high = smooth.min(), smooth.max()
        points = [(margin + (width - 2 * margin) * i / max(1, len(smooth) - 1),
                   height - margin - (height - 2 * margin) * float((v - low) / (high - low)))
                  for i, v in enumerate(smooth)]
        pen.line(points, fill=colour, width=2)
        pen.text((width - 330, 16 + 18 * row), f"{name}: {high.exp():.3g} to {low.exp():.3g}, {len(losses)} steps, "
                 f"{record['seconds'] / 60:.1f} min", fill=colour)
    image.save(path)
