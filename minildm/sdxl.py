"""What SDXL adds: two text encoders side by side, pictures described by their sizes, and a second model for the last steps.

The U-Net is the one everybody uses, with another configuration.  Podell et al. 2023.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minildm.blocks import timestep_embedding
from minildm.clip import TextConfig, TextEncoder
from minildm.tokenizer import Tokenizer

Model = Callable[[Tensor, Tensor], Tensor]

SIZE_FEATURES = 256  # sines and cosines that each number of a Framing becomes


@dataclass(frozen=True)
class SDXLTextConfig:
    """The shapes of the two text encoders; the defaults are the published ones."""

    small: TextConfig = field(default_factory=TextConfig.sdxl_l)
    large: TextConfig = field(default_factory=TextConfig.sdxl_g)

    @property
    def pooled_dim(self) -> int:
        """The width of the pooled vector, which is the large encoder's."""
        return self.large.pooled_dim


@dataclass(frozen=True)
class TokenizerPair:
    """A tokenizer for each of the two encoders: one vocabulary, but another padding."""

    small: Tokenizer
    large: Tokenizer

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Turns texts into both kinds of rows, (B, 2, L) int64; warns, once, of a text that is too long."""
        small = self.small(texts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the other has said it
            return torch.stack([small, self.large(texts)], dim=1)

    def save(self, folder: Path) -> None:
        """Writes the folders `tokenizer` and `tokenizer_2`."""
        self.small.save(folder / "tokenizer")
        self.large.save(folder / "tokenizer_2")

    @classmethod
    def load(cls, folder: Path) -> "TokenizerPair":
        """Reads what `save` wrote, and what is published; errors as `Tokenizer.load`."""
        return cls(Tokenizer.load(folder / "tokenizer"), Tokenizer.load(folder / "tokenizer_2"))


class SDXLText(nn.Module):
    """CLIP ViT-L and OpenCLIP ViT-bigG reading the same text, their features joined.  Podell et al. 2023, section 2.1.

    Args:
        cfg: the shapes of both.
    """

    def __init__(self, cfg: SDXLTextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.small = TextEncoder(cfg.small)
        self.large = TextEncoder(cfg.large)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, 2, L), a row for each encoder, to hidden (B, L, 768 + 1280) and the large one's pooled (B, 1280).

        Raises:
            ValueError: ids is shaped otherwise, or as `TextEncoder`.
        """
        if ids.ndim != 3 or ids.shape[1] != 2:
            raise ValueError(f"ids is {tuple(ids.shape)}; expected (B, 2, L), a row for each encoder: use a TokenizerPair")
        small, _ = self.small(ids[:, 0])
        large, pooled = self.large(ids[:, 1])
        return torch.cat([small, large], dim=-1), pooled


@dataclass(frozen=True)
class Framing:
    """What SDXL is told of a picture beside its caption.  Podell et al. 2023, section 2.2.

    The base model is told six numbers, the refiner five: a score of beauty in place of the target size.
    """

    original: tuple[int, int] | None = None  # height and width of the photograph before it was scaled; small means blurred
    crop: tuple[int, int] = (0, 0)  # top and left of the part that was cut out of it; (0, 0) keeps things centred
    target: tuple[int, int] | None = None  # height and width of the picture; None, here and above, for the size that is drawn
    score: float = 6.0  # 1 to 10
    negative_score: float = 2.5  # the score to move away from


def describe(framing: Framing, size: tuple[int, int], numbers: int, negative: bool = False) -> Tensor:
    """Writes a framing as sines and cosines, to be joined to the pooled text.

    Args:
        framing: what to say.
        size: height and width of the picture to be drawn, in pixels.
        numbers: how many numbers the model wants: 6 for the base model, 5 for the refiner.
        negative: whether this goes with the negative prompt.

    Returns:
        (1, numbers * 256) float32.

    Raises:
        ValueError: numbers is neither 6 nor 5.
    """
    original, target = framing.original or size, framing.target or size
    score = framing.negative_score if negative else framing.score
    told = {6: (*original, *framing.crop, *target), 5: (*original, *framing.crop, score)}
    if numbers not in told:
        raise ValueError(f"the U-Net takes {numbers} numbers beside the pooled text; SDXL's take 6 (base) or 5 (refiner)")
    return timestep_embedding(torch.tensor(told[numbers], dtype=torch.float32), SIZE_FEATURES).reshape(1, -1)


def hand_over(base: Model, refiner: Model, cutoff: int) -> Model:
    """Joins two models into one: the base model draws while there is much noise, the refiner finishes.

    Any sampler takes the result, and goes through the hand-over without noticing.  Podell et al. 2023, section 2.5; the
    experts of Balaji et al. 2022 (eDiff-I).

    Args:
        base: called as base(x, t) at timesteps of cutoff and above.
        refiner: called below.
        cutoff: the timestep, in [0, T]; 200 of 1000 is usual.
    """

    def model(x: Tensor, t: Tensor) -> Tensor:
        return base(x, t) if t[0] >= cutoff else refiner(x, t)

    return model
