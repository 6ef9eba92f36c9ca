"""Draws chapters/strip.png, the pictures on top of README.md, with the models that come with the package.

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
EMOJI = ("snake", "hot beverage", "rocket", "octopus", "red apple", "sailboat")


def main() -> None:
    """Six pictures of two objects in combinations never seen, and six emoji, in one row."""
    unseen = Shapes(size=64, objects=2, seed=77, split="held_out").draw(range(6))
    shapes = minildm.load("shapes64")(unseen.captions, seed=0)
    emoji = F.interpolate(minildm.load("emoji")(list(EMOJI), seed=0), scale_factor=2.0)  # (6, 3, 32, 32) -> (6, 3, 64, 64)
    row = torch.cat([F.pad(picture, (4, 4, 4, 4), value=1.0) for picture in torch.cat([shapes, emoji])], dim=2)
    write_atomically(OUT, to_pil(row).save)


if __name__ == "__main__":
    main()
