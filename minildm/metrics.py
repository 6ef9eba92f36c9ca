"""Measuring: does a picture show what its caption says?

The judge is a small classifier trained on real renders of every combination, the held-out ones too, so that it knows what
the generator never saw.  Its own accuracy on fresh renders is stored beside its weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from minildm.shapes import FIELDS


class Judge(nn.Module):
    """Reads the attributes of a Shapes picture: one small classifier a column of `FIELDS` on one shared network.

    Args:
        size: side of the pictures in pixels, a multiple of 8.
        width: channels of the first layer.
    """

    def __init__(self, size: int = 32, width: int = 32):
        super().__init__()
        self.size = size
        self.features = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, 4 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(256, len(names)) for names in FIELDS.values()])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pictures (B, 3, size, size) in [-1, 1] to the logits of each attribute, 8 tensors (B, choices)."""
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"this judge reads pictures (B, 3, {self.size}, {self.size}), and was given {tuple(images.shape)}")
        h = self.features(images)
        return [head(h) for head in self.heads]

    def loss(self, images: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropy summed over the attributes that the pictures have; attributes (B, 8) int64, -1 where there is none."""
        present = (attributes >= 0).any(dim=0)
        logits = self(images)
        return sum(F.cross_entropy(logits[k], attributes[:, k], ignore_index=-1) for k in range(len(FIELDS)) if present[k])

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """The likeliest attributes, (B, 8) int64."""
        self.eval()
        device = next(self.parameters()).device
        chunks = [self(chunk.to(device)) for chunk in images.split(batch_size)]
        return torch.cat([torch.stack([logit.argmax(dim=1) for logit in chunk], dim=1) for chunk in chunks]).cpu()


def load_judge(size: int = 32) -> tuple[Judge, dict[str, str]]:
    """The shipped judge for Shapes of one size, and what its file says of it: recipe, versions, its accuracy on real renders.

    Raises:
        FileNotFoundError: no judge of that size is shipped; says how to train one.
    """
    path = Path(__file__).parent / "weights" / f"judge-shapes{size}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"no judge at {path}; train one: python -m minildm train judge --size {size} --out {path.parent}"
        )
    with safe_open(path, framework="pt") as f:
        judge = Judge(size=size)
        judge.load_state_dict({name: f.get_tensor(name).float() for name in f.keys()})  # noqa: SIM118
        return judge.eval(), f.metadata()


@dataclass(frozen=True)
class CaptionAccuracy:
    """How often pictures show what their captions say, as shares in [0, 1]."""

    all_correct: float  # every named attribute right
    each: dict[str, float]  # by attribute, over the captions that name it
    count: int  # pictures judged


def caption_accuracy(read: Tensor, attributes: Tensor, mentioned: Tensor | None = None) -> CaptionAccuracy:
    """Compares what a judge read in pictures with what their captions asked for.

    Args:
        read: attributes seen in the pictures, (N, 8) int64, as from `Judge.read`.
        attributes: attributes asked for, (N, 8) int64, -1 where there is no second object.
        mentioned: (N, 8) bool, which of them the caption names; None for all there are.

    Raises:
        ValueError: no pictures, or shapes that differ.
    """
    if read.shape != attributes.shape or len(read) == 0:
        raise ValueError(
            f"read is {tuple(read.shape)} and attributes {tuple(attributes.shape)}; expected the same (N, 8), N > 0"
        )
    asked = attributes >= 0 if mentioned is None else mentioned & (attributes >= 0)
    right = read == attributes
    each = {name: right[asked[:, k], k].float().mean().item() for k, name in enumerate(FIELDS) if asked[:, k].any()}
    return CaptionAccuracy((right | ~asked).all(dim=1).float().mean().item(), each, len(read))
