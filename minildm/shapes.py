"""Shapes: an endless set of captioned pictures, drawn on the spot, whose truth is known.

Picture number i of seed s is always the same picture, because every random choice in it is a hash of (s, i): no files, no
order of drawing, no state.  The shapes are signed distance functions, so their edges are anti-aliased, and every choice is
kept as a number, so that a caption's obedience can be measured and not merely admired.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLORS = {
    "red": (225, 30, 40), "orange": (255, 140, 0), "yellow": (255, 225, 30), "green": (25, 150, 50),
    "cyan": (0, 205, 215), "blue": (30, 70, 225), "purple": (125, 40, 165), "pink": (255, 130, 185),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
BACKGROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), "brown": (95, 60, 35)}
POSITIONS = ("in the center", "at the top left", "at the top right", "at the bottom left", "at the bottom right")
RELATIONS = ("above", "below", "left of", "right of")

# The columns of an attribute row, and the words each number stands for.  A picture of one object has -1 in the last three.
FIELDS = {
    "background": tuple(BACKGROUNDS), "size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "place": POSITIONS + RELATIONS,
    "size2": SIZES, "color2": tuple(COLORS), "shape2": SHAPES,
}  # fmt: skip

# Colour and shape that no training picture shows together, though it shows each of them in every other company.
HELD_OUT = (("purple", "star"), ("cyan", "triangle"), ("orange", "ring"), ("green", "cross"))

_PHRASINGS = (
    "{a} {place}{on}",
    "{a}{on}, {place}",
    "a picture of {a} {place}{on}",
    "{place}, {a}{on}",
    "there is {a} {place}{on}",
)
_CENTER = np.array([[0.5, 0.5], [0.34, 0.34], [0.66, 0.34], [0.34, 0.66], [0.66, 0.66]])  # (x, y) of each of POSITIONS
_OFFSET = np.array([[0, -0.22], [0, 0.22], [-0.22, 0], [0.22, 0]])  # from the middle to the first object, for RELATIONS
_RADIUS = {1: (0.15, 0.235), 2: (0.125, 0.19)}  # small and large, as a share of the picture's side, by number of objects


@dataclass(frozen=True)
class ShapesBatch:
    """Some pictures of `Shapes` and everything that is known about them."""

    images: Tensor  # (N, 3, H, W) float32 in [-1, 1]
    captions: list[str]
    attributes: Tensor  # (N, 8) int64, columns as in FIELDS; -1 where there is no second object
    mentioned: Tensor  # (N, 8) bool: whether the caption says it


class Shapes:
    """One or two coloured shapes on a plain ground, with a caption and the truth behind it.

    Args:
        size: side of the pictures in pixels, at least 16; 32 and 64 are what the judges read.
        objects: 1 or 2 objects a picture.
        seed: another seed, another endless set.
        split: "train" never shows a pair of HELD_OUT, "held_out" shows one in every picture, "all" ignores the list.
        partial: probability, in [0, 1], that the caption keeps back some of what the picture shows.

    Raises:
        ValueError: an argument is outside its range; says which.
    """

    name = "shapes"

    def __init__(self, size: int = 32, objects: int = 1, seed: int = 0, split: str = "train", partial: float = 0.0):
        if size < 16:
            raise ValueError(f"size is {size}, and a shape needs at least 16 pixels; use 32 or 64")
        if objects not in (1, 2):
            raise ValueError(f"objects is {objects}; a picture holds 1 or 2")
        if split not in ("train", "held_out", "all"):
            raise ValueError(f'split is {split!r}; use "train", "held_out" or "all"')
        if not 0 <= partial <= 1:
            raise ValueError(f"partial is {partial}; it is a probability, from 0 to 1")
        self.size, self.objects, self.seed, self.split, self.partial = size, objects, seed, split, partial
        everything = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
        held_out = [(list(COLORS).index(c), SHAPES.index(s)) for c, s in HELD_OUT]
        seen = [pair for pair in everything if pair not in held_out]
        self._second_pairs = np.array(everything if split == "all" else seen)
        self._first_pairs = np.array(held_out) if split == "held_out" else self._second_pairs

    def __len__(self) -> int:
        return 2**31  # as good as endless; batch() takes any indices

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        images, captions = self.batch([index])
        return images[0], captions[0]

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, list[str]]:
        """The pictures with these numbers, (N, 3, H, W) float32 in [-1, 1], and their captions."""
        drawn = self.draw(indices)
        return drawn.images, drawn.captions

    def draw(self, indices: Iterable[int]) -> ShapesBatch:
        """Draws the pictures with these numbers, and says all that is known of them.

        Args:
            indices: whole numbers from 0, in any order; the same number is always the same picture.
        """
        u = _hash_uniform(self.seed, np.fromiter(indices, dtype=np.uint64), count=24)  # (N, 24)
        attributes = self.attributes(u)
        images = self._paint(attributes, u[:, 10:18])
        said = self._mentioned(attributes, u[:, 18:20])
        captions = [self.caption(a, m, p) for a, m, p in zip(attributes, said, _pick(u[:, 20], len(_PHRASINGS)), strict=True)]
        return ShapesBatch(images, captions, torch.from_numpy(attributes), torch.from_numpy(said))

    def attributes(self, u: np.ndarray) -> np.ndarray:
        """Turns uniform numbers (N, at least 6) into attribute rows (N, 8)."""
        a = np.full((len(u), len(FIELDS)), -1, dtype=np.int64)
        a[:, 0] = _pick(u[:, 0], len(BACKGROUNDS))
        a[:, 1] = _pick(u[:, 1], len(SIZES))
        a[:, 2:4] = self._first_pairs[_pick(u[:, 2], len(self._first_pairs))]
        a[:, 4] = _pick(u[:, 3], len(POSITIONS))
        if self.objects == 2:
            a[:, 4] = len(POSITIONS) + _pick(u[:, 3], len(RELATIONS))
            a[:, 5] = _pick(u[:, 4], len(SIZES))
            a[:, 6:8] = self._second_pairs[_pick(u[:, 5], len(self._second_pairs))]
        return a

    def _mentioned(self, a: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Which attributes the caption names: all of them, or for a share `partial` of the pictures a random few."""
        said = a >= 0
        dropped = u[:, 0] < self.partial
        bits = _pick(u[:, 1], 16)  # four yes-or-no choices: background, sizes, colours, place
        for bit, columns in enumerate([(0,), (1, 5), (2, 6), (4,)]):
            if self.objects == 2 and columns == (4,):
                continue  # with two objects the place is a relation: without it there is no sentence
            silent = dropped & ((bits >> bit) & 1 == 1)
            for column in columns:
                said[:, column] &= ~silent
        return said

    def caption(self, attributes: np.ndarray, mentioned: np.ndarray | None = None, phrasing: int = 0) -> str:
        """Puts one attribute row into words.

        Args:
            attributes: (8,) integers, columns as in FIELDS.
            mentioned: (8,) booleans, what to name; everything if None.
            phrasing: which of the sentence patterns to use.
        """
        said = attributes >= 0 if mentioned is None else mentioned
        word = {f: names[v] if s else "" for (f, names), v, s in zip(FIELDS.items(), attributes, said, strict=True)}
        first = _noun_phrase(word["size"], word["color"], word["shape"])
        ground = f" on a {word['background']} background" if word["background"] else ""
        if self.objects == 2:
            second = _noun_phrase(word["size2"], word["color2"], word["shape2"])
            first, word["place"] = f"{first} {word['place']} {second}", ""
        text = _PHRASINGS[phrasing].format(a=first, place=word["place"], on=ground)
        return " ".join(text.split()).strip(" ,").replace(" ,", ",")

    def _paint(self, a: np.ndarray, u: np.ndarray) -> Tensor:
        """Paints the ground, then each object over it; u (N, 8) moves and scales them a little."""
        ground, paint = np.array(list(BACKGROUNDS.values())), np.array(list(COLORS.values()))
        image = np.empty((len(a), 3, self.size, self.size), dtype=np.float32)
        image[:] = ground[a[:, 0], :, None, None]
        jitter = (u - 0.5).astype(np.float32)  # (N, 8)
        radius = np.array(_RADIUS[self.objects])
        for k in range(self.objects):
            size, color, shape = a[:, 1 + 4 * k], a[:, 2 + 4 * k], a[:, 3 + 4 * k]
            first = _CENTER[a[:, 4]] if self.objects == 1 else 0.5 + _OFFSET[a[:, 4] - len(POSITIONS)]
            center = (1 - first if k else first) + 0.05 * jitter[:, 4 * k : 4 * k + 2]
            r = radius[size] * (1 + 0.12 * jitter[:, 4 * k + 2])
            cover = _coverage(shape, center.astype(np.float32), r.astype(np.float32), self.size)[:, None]  # (N, 1, H, W)
            image += cover * (paint[color, :, None, None] - image)
        return torch.from_numpy(image).div_(127.5).sub_(1)


def from_one_side(attributes: Tensor, mentioned: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The same pictures, told one way only: "a below b" becomes "b above a", and "a right of b" becomes "b left of a".

    A picture does not show which of its two objects its caption named first; whoever reads it needs one order.

    Args:
        attributes: (N, 8) integers, columns as in FIELDS; rows of one object stay as they are.
        mentioned: (N, 8) booleans that go with them; None for none.
    """
    place = attributes[:, 4]
    turned = (place == FIELDS["place"].index("below")) | (place == FIELDS["place"].index("right of"))
    swapped = [0, 5, 6, 7, 4, 1, 2, 3]
    told = torch.where(turned[:, None], attributes[:, swapped], attributes)
    told[:, 4] -= turned.long()  # the opposite stands just before each of the two
    return told, mentioned if mentioned is None else torch.where(turned[:, None], mentioned[:, swapped], mentioned)


def _noun_phrase(*words: str) -> str:
    phrase = " ".join(filter(None, words))
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _pick(u: np.ndarray, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) to whole numbers in [0, n)."""
    return (u * n).astype(np.int64)


def _hash_uniform(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (N, count), a function of seed and index (N,) alone.  SplitMix64, Steele et al. 2014."""
    with np.errstate(over="ignore"):
        start = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95) + index[:, None] * np.uint64(0x9E3779B97F4A7C15)
        z = _mix(_mix(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # (N, count)
    return (z >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _coverage(shape: np.ndarray, center: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that the object covers, (N, H, W): its signed distance in pixels, cut to [0, 1]."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = (grid - center[:, :1]) / radius[:, None]  # (N, W)
    y = (grid - center[:, 1:]) / radius[:, None]  # (N, H)
    cover = np.empty((len(shape), size, size), dtype=np.float32)
    for s, name in enumerate(SHAPES):
        which = np.flatnonzero(shape == s)
        if len(which):
            distance = _DISTANCE[name](x[which, None, :], y[which, :, None])  # (n, H, W), in radii
            cover[which] = np.clip(0.5 - distance * (radius[which, None, None] * size), 0, 1)
    return cover


def _circle(x, y):
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.8) - 0.27


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.05, np.minimum(x, y) - 0.36)


def _triangle(x, y):
    return np.maximum(y - 0.75, 0.8660254 * np.abs(x) - 0.5 * y - 0.6)


def _star(x, y):
    """Five points: fold the plane into one tenth of a turn, where the outline is a single straight line."""
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # 0 on a point, pi / 5 in a dent
    r = np.sqrt(x * x + y * y)
    tip, dent = np.array([1.2, 0.0]), 0.56 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([dent[1] - tip[1], tip[0] - dent[0]]) / np.hypot(*(dent - tip))
    return (r * (np.cos(angle) * np.float32(normal[0]) + np.sin(angle) * np.float32(normal[1]))) - np.float32(normal @ tip)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "ring": _ring}
