"""Draws what the shipped models can do: chapters/strip.png, on top of README.md, and emoji.png beside this file.

python tests/benchmarks/pictures.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import minildm
from minildm.checkpoint import write_atomically
from minildm.data import Emoji
from minildm.plot import caption_grid, to_pil
from minildm.report import nearest_neighbour
from minildm.shapes import Shapes

STRIP, EMOJI = Path(__file__).parents[2] / "chapters" / "strip.png", Path(__file__).parent / "emoji.png"
INVENTED = (
    "blue apple", "dog face with tears of joy", "green fish", "sleeping cat face", "red elephant", "angry pizza", "two bananas",
    "purple tree", "pig face with halo", "yellow book and pencil", "snowman with cowboy hat", "house",
)  # fmt: skip


def strip() -> Image.Image:
    """Twelve pictures of two objects, in combinations never seen, in one row: the first twelve, whatever they are."""
    unseen = Shapes(size=64, objects=2, seed=77, split="held_out").draw(range(12))
    pictures = minildm.load("shapes64")(unseen.captions, seed=0)
    return to_pil(torch.cat([F.pad(picture, (4, 4, 4, 4), value=1.0) for picture in pictures], dim=2))


def emoji() -> Image.Image:
    """Twelve captions of the set, drawn at random, and twelve that are not in it: samples, each over its nearest picture."""
    dataset, pipe = Emoji(size=32), minildm.load("emoji")
    real, names = dataset.batch(range(len(dataset)))
    real = real / 2 + 0.5
    known = [names[k] for k in torch.randperm(len(names), generator=torch.Generator().manual_seed(77))[:12]]
    assert not set(INVENTED) & set(names)
    rows, below = [], []
    for captions in (known, list(INVENTED)):
        drawn = pipe(captions, seed=0)
        _, nearest, _ = nearest_neighbour(drawn, real)
        rows += [drawn, real[nearest]]
        below += captions + [f"[nearest] {names[k]}" for k in nearest]
    return caption_grid(torch.cat(rows), below, columns=12, side=96)


def main() -> None:
    """Both pictures."""
    write_atomically(STRIP, strip().save)
    write_atomically(EMOJI, emoji().save)


if __name__ == "__main__":
    main()
