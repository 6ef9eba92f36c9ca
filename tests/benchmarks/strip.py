"""Draws chapters/strip.png, the pictures on top of README.md, with a model that comes with the package.

python tests/benchmarks/strip.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import minildm
from minildm.checkpoint import write_atomically
from minildm.plot import to_pil
from minildm.shapes import Shapes

OUT = Path(__file__).parents[2] / "chapters" / "strip.png"


def main() -> None:
    """Twelve pictures of two objects, in combinations never seen, in one row: the first twelve, whatever they are."""
    unseen = Shapes(size=64, objects=2, seed=77, split="held_out").draw(range(12))
    pictures = minildm.load("shapes64")(unseen.captions, seed=0)
    row = torch.cat([F.pad(picture, (4, 4, 4, 4), value=1.0) for picture in pictures], dim=2)
    write_atomically(OUT, to_pil(row).save)


if __name__ == "__main__":
    main()
