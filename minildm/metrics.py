"""Measuring: does a picture show what its caption says, and do many together look like real ones?

The judge is a small classifier trained on real renders of every combination, the held-out ones too, so that it knows what
the generator never saw.  Its own accuracy on fresh renders is stored beside its weights.

Scores of many pictures (`minildm.scores`) need a network to look through.  The published one is Inception, which only a
download brings; the judge and our small perceptual features work offline, and what they say is called toy-FID and toy-IS,
because the numbers of two networks must not be compared.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.files import WEIGHTS, read_shipped
from minildm.perceptual import load_features
from minildm.scores import Extractor, extract, fid, inception_score
from minildm.shapes import FIELDS, from_one_side


class Judge(nn.Module):
    """Reads the attributes of a Shapes picture: one small classifier a column of `FIELDS` on one shared network.

    Args:
        size: side of the pictures in pixels, a multiple of 8.
        objects: how many objects its pictures hold, 1 or 2.
        width: channels of the first layer.

    Raises:
        ValueError: size is not a multiple of 8.
    """

    def __init__(self, size: int = 32, objects: int = 1, width: int = 32):
        super().__init__()
        if size < 8 or size % 8:
            raise ValueError(f"size is {size}; a judge reads pictures whose side is a multiple of 8, such as 32 or 64")
        self.size, self.objects = size, objects
        fields = list(FIELDS.values())[: 5 if objects == 1 else 8]
        self.features = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, 4 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * width * 4**2, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(256, len(names)) for names in fields])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pictures (B, 3, size, size) in [-1, 1] to the logits of each attribute, 5 or 8 tensors (B, choices)."""
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"this judge reads pictures (B, 3, {self.size}, {self.size}), and was given {tuple(images.shape)}")
        h = self.features(images)
        return [head(h) for head in self.heads]

    def loss(self, images: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropy summed over the attributes; attributes (B, 8) int64."""
        return sum(F.cross_entropy(logit, attributes[:, k]) for k, logit in enumerate(self(images)))

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """The likeliest attributes, (B, 8) int64; -1 in the columns of a second object that this judge does not look for."""
        self.eval()
        device = next(self.parameters()).device
        chunks = [self(chunk.to(device)) for chunk in images.split(batch_size)]
        read = torch.cat([torch.stack([logit.argmax(dim=1) for logit in chunk], dim=1) for chunk in chunks]).cpu()
        return F.pad(read, (0, len(FIELDS) - read.shape[1]), value=-1)


def load_judge(size: int = 32, objects: int = 1) -> tuple[Judge, dict[str, str]]:
    """The shipped judge for one kind of Shapes, and what its file says of it: recipe, versions, accuracy on real renders.

    Raises:
        FileNotFoundError: no judge of that kind is shipped; says how to train one.
    """
    path = WEIGHTS / judge_file(size, objects)
    if not path.exists():
        command = f"python -m minildm judge --size {size} --objects {objects} --out {path.parent}"
        raise FileNotFoundError(f"no judge at {path}; train one: {command}")
    weights, about = read_shipped(path.name)
    judge = Judge(size=size, objects=objects)
    judge.load_state_dict(weights)
    return judge.eval(), about


def judge_file(size: int, objects: int) -> str:
    """What the file of a judge is called."""
    return f"judge-shapes{size}-objects{objects}.safetensors"


@dataclass(frozen=True)
class CaptionAccuracy:
    """How often pictures show what their captions say, as shares in [0, 1]."""

    all_correct: float  # every named attribute right
    each: dict[str, float]  # by attribute, over the captions that name it
    count: int  # pictures judged

    @property
    def interval(self) -> tuple[float, float]:
        """Where all_correct lies with 95 % confidence, given that only `count` pictures were judged.  Wilson 1927."""
        z2_n, p = 1.96**2 / self.count, self.all_correct
        middle, half = p + z2_n / 2, (z2_n * (p * (1 - p) + z2_n / 4)) ** 0.5
        return max(0.0, (middle - half) / (1 + z2_n)), min(1.0, (middle + half) / (1 + z2_n))


def caption_accuracy(read: Tensor, attributes: Tensor, mentioned: Tensor | None = None) -> CaptionAccuracy:
    """Compares what a judge read in pictures with what their captions asked for.

    Args:
        read: attributes seen in the pictures, (N, 8) int64, as from `Judge.read`.
        attributes: attributes asked for, (N, 8) int64, -1 where there is no second object.
        mentioned: (N, 8) bool, which of them the caption names; None for all there are.

    Raises:
        ValueError: no pictures, shapes that differ, or captions of two objects before a judge that looks for one.
    """
    if read.shape != attributes.shape or len(read) == 0:
        raise ValueError(
            f"read is {tuple(read.shape)} and attributes {tuple(attributes.shape)}; expected the same (N, 8), N > 0"
        )
    attributes, mentioned = from_one_side(attributes, mentioned)  # as a judge reads
    asked = attributes >= 0 if mentioned is None else mentioned & (attributes >= 0)
    if (asked & (read < 0)).any():
        raise ValueError("the captions name a second object, and the judge looked for one: use Judge(objects=2)")
    right = read == attributes
    each = {name: right[asked[:, k], k].float().mean().item() for k, name in enumerate(FIELDS) if asked[:, k].any()}
    return CaptionAccuracy((right | ~asked).all(dim=1).float().mean().item(), each, len(read))


def toy_extractor(subject: str) -> Extractor:
    """Features that work offline, of pictures in [-1, 1].  Scores over them are toy scores, and are to be called so.

    Args:
        subject: "shapes" for what the judge of one-object Shapes sees before it names anything, of (B, 3, 32, 32) to
            (B, 256); "emoji" for the mean of each channel of the small perceptual features, of any size to (B, 112).

    Raises:
        ValueError: another subject.
    """
    if subject == "shapes":
        return load_judge()[0].features
    if subject == "emoji":
        look = load_features()[0]
        return lambda images: torch.cat([reduce(seen, "b c h w -> b c", "mean") for seen in look(images)], dim=1)
    raise ValueError(f'there are toy features for "shapes" and "emoji", and not for "{subject}"')


def toy_fid(real: Tensor, fake: Tensor, subject: str) -> float:
    """Fréchet distance over the features of `toy_extractor`; pictures in [-1, 1].  To be compared with itself only.

    Shapes have 256 features and emoji 112: take more pictures than that, as many as you can, and always the same number.
    """
    return fid(real, fake, toy_extractor(subject))


def toy_inception_score(images: Tensor, splits: int = 10, generator: torch.Generator | None = None) -> tuple[float, float]:
    """Inception score over the judge's opinion of colour and shape together, so that there are 48 classes.

    Args:
        images: pictures of one-object Shapes, (N, 3, 32, 32) in [-1, 1].
        splits: into how many parts they go, each scored by itself; parts of a few hundred pictures show 48 classes in full.
        generator: shuffles them first.

    Returns:
        Mean and standard deviation over the parts, between 1 and 48.
    """
    judge, _ = load_judge()
    fields = [list(FIELDS).index(name) for name in ("color", "shape")]

    def together(batch: Tensor) -> Tensor:
        color, shape = (judge(batch)[k] for k in fields)
        both = rearrange(color, "b c -> b c 1") + rearrange(shape, "b s -> b 1 s")  # logits add where probabilities multiply
        return rearrange(both, "b c s -> b (c s)")

    return inception_score(torch.cat([*extract(images, together)]), splits=splits, generator=generator)
