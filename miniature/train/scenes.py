"""What the miniature learns to draw: scenes, the captions that say all of them, and their pictures."""

import hashlib
import random
from dataclasses import dataclass, replace

import torch

SIDE = 128
COLOURS = {"red": (214, 45, 48), "orange": (243, 138, 28), "yellow": (250, 212, 50), "green": (52, 160, 75),
           "blue": (40, 100, 215), "purple": (125, 60, 175), "pink": (245, 135, 185), "brown": (130, 82, 45)}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (165, 168, 172), "black": (25, 25, 28), "cream": (245, 232, 200)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
#: Radius in pixels. The VAE has one latent for 8 by 8 pixels: a star of radius 13 comes back as a circle.
SIZES = {"small": 16.0, "large": 24.0}
#: Centres in pixels, by the words for them.
POSITIONS = {"at the top left": (29, 29), "at the top": (64, 29), "at the top right": (99, 29),
             "on the left": (29, 64), "in the middle": (64, 64), "on the right": (99, 64),
             "at the bottom left": (29, 99), "at the bottom": (64, 99), "at the bottom right": (99, 99)}
#: Centres of several shapes in a row, and the radius of each.
ROWS = {"two": ((40, 88), 18.0), "three": ((22, 64, 106), 16.0)}
LEAVES = ("green", "pink", "orange", "red")
_TRUNK = (104, 72, 50)


@dataclass(frozen=True)
class Scene:
    """One shape, a row of equal shapes (``count`` is a word), or a bonsai (``shape`` is "bonsai", ``colour`` its
    pot's)."""

    shape: str
    colour: str
    background: str
    position: str = "in the middle"
    size: str = "large"
    count: str = "one"
    leaves: str = "green"

    def caption(self) -> str:
        if self.shape == "bonsai":
            return (f"a bonsai tree with {self.leaves} leaves in a {self.colour} pot "
                    f"on a {self.background} background")
        if self.count != "one":
            return f"{self.count} {self.colour} {_plural(self.shape)} on a {self.background} background"
        return f"a {self.size} {self.colour} {self.shape} {self.position} on a {self.background} background"

    def edit(self, colour: str) -> tuple[str, "Scene"]:
        """The words that ask for another colour, and the scene they ask for."""
        what = "the pot" if self.shape == "bonsai" else "it" if self.count == "one" else "them"
        return f"make {what} {colour}", replace(self, colour=colour)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def held_out(caption: str) -> bool:
    """Whether what ``caption`` says is kept for measuring: one in ten is."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def random_scene(source: random.Random, held: bool = False) -> Scene:
    """A scene of the training part, or of the part held out."""
    while True:
        kind = source.random()
        colour, background = source.choice(list(COLOURS)), source.choice(list(BACKGROUNDS))
        if kind < 0.6:
            scene = Scene(source.choice(SHAPES), colour, background, source.choice(list(POSITIONS)),
                          source.choice(list(SIZES)))
        elif kind < 0.8:
            scene = Scene(source.choice(SHAPES), colour, background, count=source.choice(list(ROWS)))
        else:
            scene = Scene("bonsai", colour, background, leaves=source.choice(LEAVES))
        if held_out(scene.caption()) == held:
            return scene


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the outline (negative inside) of a shape of radius 1 at the origin, y downwards."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.94
    if shape == "triangle":
        return torch.maximum(0.866 * x.abs() - 0.5 * (y - 0.2), (y - 0.2)) - 0.58
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74).abs() - 0.26
    if shape == "cross":
        wide, thin = 0.98, 0.36
        return torch.minimum(torch.maximum(x.abs() - wide, y.abs() - thin),
                             torch.maximum(x.abs() - thin, y.abs() - wide))
    # A five-pointed star: the distance to the edge of one of ten mirrored wedges.
    wedge = 2 * torch.pi / 5
    angle = (torch.atan2(x, -y) + wedge / 2) % wedge - wedge / 2
    radius = torch.hypot(x, y)
    across, along = radius * angle.abs().sin(), radius * angle.cos()
    tip, notch = (0.0, 1.08), (0.46 * torch.tensor(wedge / 2).sin(), 0.46 * torch.tensor(wedge / 2).cos())
    edge_x, edge_y = notch[0] - tip[0], notch[1] - tip[1]
    return ((across - tip[0]) * -edge_y + (along - tip[1]) * edge_x) / torch.hypot(edge_x, edge_y)


def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(SIDE) + 0.5
    return axis[None, :].expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)


def _colour(rgb: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float32)[:, None, None] / 127.5 - 1


def _paint(picture: torch.Tensor, distance: torch.Tensor, rgb: tuple[int, int, int]) -> torch.Tensor:
    """Cover the inside of ``distance`` (pixels) with a colour, its edge one pixel soft."""
    cover = (0.5 - distance).clamp(0, 1)
    return picture + cover * (_colour(rgb) - picture)


def _capsule(x, y, ax, ay, bx, by, radius):
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - ax - along * dx, y - ay - along * dy) - radius


def _ellipse(x, y, cx, cy, rx, ry):
    return (torch.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)


def _bonsai(picture: torch.Tensor, scene: Scene, dx: float, dy: float) -> torch.Tensor:
    x, y = _grid()
    x, y = x - dx, y - dy
    for ax, ay, bx, by, r in ((64, 100, 57, 84, 5), (57, 84, 70, 66, 4), (70, 66, 64, 48, 3), (66, 70, 90, 60, 2.5),
                              (60, 80, 38, 70, 2.5)):
        picture = _paint(picture, _capsule(x, y, ax, ay, bx, by, r), _TRUNK)
    for cx, cy, rx, ry in ((36, 64, 19, 10), (92, 55, 20, 11), (62, 36, 27, 16)):
        picture = _paint(picture, _ellipse(x, y, cx, cy, rx, ry), COLOURS[scene.leaves])
    bowl = torch.maximum((x - 64).abs() - (30 - 0.35 * (y - 100)), (y - 110).abs() - 10)
    rim = torch.maximum((x - 64).abs() - 34, (y - 100).abs() - 3)
    return _paint(picture, torch.minimum(bowl, rim), COLOURS[scene.colour])


def draw(scene: Scene, source: random.Random | None = None) -> torch.Tensor:
    """The picture of ``scene``, (3, 128, 128) in -1 to 1; with ``source``, moved and sized a little by chance."""
    jitter = source.uniform if source else lambda low, high: 0.0
    picture = _colour(BACKGROUNDS[scene.background]).expand(3, SIDE, SIDE)
    if scene.shape == "bonsai":
        return _bonsai(picture, scene, jitter(-2, 2), jitter(-2, 2))
    x, y = _grid()
    if scene.count == "one":
        (cx, cy), radius = POSITIONS[scene.position], SIZES[scene.size]
        centres = [(cx, cy)]
    else:
        columns, radius = ROWS[scene.count]
        centres = [(cx, SIDE / 2) for cx in columns]
    radius *= 1 + jitter(-0.05, 0.05)
    dx, dy = jitter(-2, 2), jitter(-2, 2)
    for cx, cy in centres:
        distance = shape_distance(scene.shape, (x - cx - dx) / radius, (y - cy - dy) / radius) * radius
        picture = _paint(picture, distance, COLOURS[scene.colour])
    return picture
