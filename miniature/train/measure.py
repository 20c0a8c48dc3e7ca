"""What a picture shows, measured: background, colours, shape by template, position, size and count."""

import random
from functools import cache

import torch

from bonsai_image.miniature.train.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    ROWS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    draw,
    random_scene,
)

#: How far, in 0 to 255 over three channels, a pixel must be from the background to belong to an object.
_DIFFERENT = 60.0
_SMALLEST = 40
_TEMPLATE = 32
#: The side of a template in square roots of its area; a star's points lie farthest out, at 0.9.
_FRAME = 2.0
_COUNTS = {1: "one", 2: "two", 3: "three"}
_POT_TOP, _LEAVES_BOTTOM = 98, 72


def nearest(rgb: torch.Tensor, names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the colour nearest to ``rgb`` (3,), 0 to 255."""
    return min(names, key=lambda name: float((rgb - torch.tensor(names[name])).norm()))


def components(mask: torch.Tensor) -> list[torch.Tensor]:
    """The connected parts (8 neighbours) of a boolean mask (H, W), without specks, from left to right."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view_as(mask) * mask
    while True:
        spread = torch.nn.functional.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    parts = [labels == value for value, size in zip(*labels.unique(return_counts=True), strict=True)
             if value and size >= _SMALLEST]
    return sorted(parts, key=lambda part: float(part.nonzero()[:, 1].float().mean()))


def _centre(mask: torch.Tensor) -> torch.Tensor:
    """The centroid (x, y) of a mask, in pixels."""
    return mask.nonzero().float().mean(0).flip(0) + 0.5


def _template(mask: torch.Tensor) -> torch.Tensor:
    """A mask moved and scaled to one centroid and one area, (32, 32): a few pixels at its edge change neither much."""
    side = torch.tensor(mask.shape[::-1])
    scale = _FRAME * mask.sum().sqrt() / side
    shift = 2 * _centre(mask) / side - 1
    theta = torch.cat([torch.diag(scale), shift[:, None]], 1)
    grid = torch.nn.functional.affine_grid(theta[None], [1, 1, _TEMPLATE, _TEMPLATE], align_corners=False)
    return torch.nn.functional.grid_sample(mask[None, None].float(), grid, align_corners=False)[0, 0] > 0.5


def _agreement(mask: torch.Tensor, shape: str) -> float:
    found, template = _template(mask), _templates()[shape]
    return float((found & template).sum() / (found | template).sum())


@cache
def _templates() -> dict[str, torch.Tensor]:
    return {shape: _template(_objects(draw(Scene(shape, "blue", "white")))) for shape in (*SHAPES, "bonsai")}


@cache
def _areas() -> dict[tuple[str, str], float]:
    """Pixels that a shape covers, by its size too."""
    return {(shape, size): float(_objects(draw(Scene(shape, "blue", "white", size=size))).sum())
            for shape in (*SHAPES, "bonsai") for size in SIZES}


def _background(pixels: torch.Tensor) -> torch.Tensor:
    """The median colour of the outermost rows and columns of (3, H, W)."""
    edge = torch.cat([pixels[:, :2].flatten(1), pixels[:, -2:].flatten(1), pixels[:, :, :2].flatten(1),
                      pixels[:, :, -2:].flatten(1)], 1)
    return edge.median(1).values


def _pixels(picture: torch.Tensor) -> torch.Tensor:
    return (picture.clamp(-1, 1) + 1) * 127.5


def _objects(picture: torch.Tensor) -> torch.Tensor:
    pixels = _pixels(picture)
    return (pixels - _background(pixels)[:, None, None]).norm(dim=0) > _DIFFERENT


def _inner_colour(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The median colour (3,) of a part's inside, where it has one."""
    inside = -torch.nn.functional.max_pool2d(-mask[None, None].float(), 3, 1, 1)[0, 0] > 0
    return pixels[:, inside if int(inside.sum()) >= 8 else mask].median(1).values


def _sharpened(pixels: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` up to the middle of its edge: where a pixel is nearer to its colour than to the background's."""
    colour, background = _inner_colour(pixels, part), _background(pixels)
    nearer = (pixels - colour[:, None, None]).norm(dim=0) < (pixels - background[:, None, None]).norm(dim=0)
    return part & nearer if int((part & nearer).sum()) >= _SMALLEST else part


def describe(picture: torch.Tensor) -> dict[str, str]:
    """What ``picture`` (3, 128, 128), in -1 to 1, shows; "none" where there is nothing to see."""
    if picture.shape != (3, SIDE, SIDE):
        raise ValueError(f"expected a picture of shape (3, {SIDE}, {SIDE}), got {tuple(picture.shape)}")
    pixels, mask = _pixels(picture), _objects(picture)
    seen = {"background": nearest(_background(pixels), BACKGROUNDS)}
    parts = components(mask)
    if not parts:
        return seen | dict.fromkeys(("shape", "colour", "position", "size", "count", "leaves"), "none")
    whole = torch.stack(parts).any(0)
    sharp = [_sharpened(pixels, part) for part in parts]
    agreement = {shape: sum(_agreement(part, shape) for part in sharp) / len(sharp) for shape in SHAPES}
    agreement["bonsai"] = _agreement(whole, "bonsai")
    seen["shape"] = max(agreement, key=agreement.get)
    seen["count"] = "one" if seen["shape"] == "bonsai" else _COUNTS.get(len(parts), "many")
    centre, area = _centre(sharp[0]), float(sharp[0].sum())
    seen["position"] = min(POSITIONS, key=lambda name: float((centre - torch.tensor(POSITIONS[name])).norm()))
    seen["size"] = min(SIZES, key=lambda name: abs(_areas()[seen["shape"], name]**0.5 - area**0.5))
    row = torch.arange(SIDE)[:, None]
    pot = whole & (row > _POT_TOP) if seen["shape"] == "bonsai" else whole
    leaves = whole & (row < _LEAVES_BOTTOM)
    for name, mask in (("colour", pot), ("leaves", leaves)):
        seen[name] = nearest(_inner_colour(pixels, mask), COLOURS) if mask.any() else "none"
    return seen


def expected(scene: Scene) -> dict[str, str]:
    """The attributes that a scene's caption fixes."""
    wanted = {"background": scene.background, "shape": scene.shape, "colour": scene.colour, "count": scene.count}
    if scene.shape == "bonsai":
        return wanted | {"leaves": scene.leaves}
    return wanted if scene.count in ROWS else wanted | {"position": scene.position, "size": scene.size}


def score(scenes: list[Scene], pictures: torch.Tensor) -> dict[str, float]:
    """Per attribute the share of scenes, of those that fix it, whose picture shows it; ``all`` counts those right in
    everything."""
    right: dict[str, list[bool]] = {}
    for scene, picture in zip(scenes, pictures, strict=True):
        seen, wanted = describe(picture), expected(scene)
        for name, value in wanted.items():
            right.setdefault(name, []).append(seen[name] == value)
        right.setdefault("all", []).append(all(seen[name] == value for name, value in wanted.items()))
    return {name: sum(values) / len(values) for name, values in right.items()}


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes that training never saw."""
    source = random.Random(seed)
    return [random_scene(source, held=True) for _ in range(count)]
