"""Recipes: which parts to build for a dataset, how long to train each, and the one function that trains them all.

A recipe is a value.  `train_parts` turns it into trained networks; what is done with those is the caller's business.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from minildm.clip import CLIP, ImageConfig, TextConfig, TextEncoder
from minildm.distributed import World, recompute, whole
from minildm.machine import best_device
from minildm.metrics import Judge, caption_accuracy
from minildm.perceptual import VGGFeatures
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes, from_one_side
from minildm.tokenizer import Tokenizer
from minildm.train import (
    Dataset,
    Fit,
    Progress,
    cache_latents,
    fit,
    step_generator,
    train_autoencoder,
    train_clip,
    train_diffusion,
)
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

SCHEDULES = {"scaled_linear": NoiseSchedule.scaled_linear, "cosine": NoiseSchedule.cosine}


@dataclass(frozen=True)
class Recipe:
    """All choices of a text-to-image training run."""

    size: int  # side of the pictures in pixels
    vae: VAEConfig
    unet: UNetConfig
    first: Fit  # the autoencoder
    words: Fit  # the text encoder, beside an image encoder
    second: Fit  # the U-Net
    pictures: int = 20_000  # how many are encoded for the second stage, at most
    vocab_size: int = 512  # of the tokenizer, at most
    context_length: int = 32
    dropout: float = 0.1  # share of the captions left out, for guidance
    prediction_type: str = "v_prediction"
    spacing: str = "trailing"  # begins where the schedule ends: at pure noise
    guidance_scale: float = 3.0  # what such models like best
    schedule: str = "scaled_linear"  # or "cosine"; either way the last step is pure noise
    times_mean: float | None = None  # of the training times, see `Crowded`; None draws all equally often
    train_text: bool = False  # the text encoder begins with the U-Net and learns with it: there is no CLIP, and `words` is idle

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")

    @classmethod
    def small(
        cls,
        size: int = 32,
        vae_steps: int = 600,
        word_steps: int = 80,
        steps: int = 1200,
        pictures: int = 20_000,
        context_length: int = 32,
        seed: int = 0,
    ) -> "Recipe":
        """For pictures of `size` pixels, trained on a laptop in minutes: 8 x 8 latents at 32 pixels, and 8 x 8 again at 64.

        What the optimizer, the schedule and the times are worth was measured: `tests/benchmarks/README.md`.

        Raises:
            ValueError: the latents of such pictures could not be halved; says which sizes can be.
        """
        vae = VAEConfig.mini() if size < 64 else VAEConfig.tiny()
        if size < 8 or size % (2 * vae.downsampling):
            raise ValueError(f"size is {size}; choose a multiple of 8, or of 16 from 64 on: 32 and 64 are usual")
        fast = Fit(steps=steps, lr=3e-3, warmup=50, ema=0.99, seed=seed + 2, muon=0.02, decay="linear")
        return cls(
            size=size,
            pictures=pictures,
            vae=replace(vae, widths=(64,) if size < 64 else (48, 64)),
            unet=replace(UNetConfig.tiny(), widths=(48, 72)),
            first=replace(fast, steps=vae_steps, lr=6e-3, warmup=20, seed=seed),
            words=replace(fast, steps=word_steps, lr=2e-3, warmup=10, seed=seed + 1, batch_size=128, muon=0.05),
            second=fast,
            context_length=context_length,
            schedule="cosine",
            times_mean=0.69,
            guidance_scale=2.0,
        )


@dataclass(frozen=True)
class Crowded(NoiseSchedule):
    """A schedule whose training times crowd where most is decided, and are rare where all is plain or nothing can be known.

    Logit-normal, of deviation 1: `mean` 0 crowds in the middle, above it towards noise.  Esser et al. 2024, equation 19.
    """

    mean: float = 0.0

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training timesteps, (count,) int64 in [0, T)."""
        share = torch.sigmoid(self.mean + torch.randn(count, generator=generator))
        return (share * self.T).long().clamp(max=self.T - 1)


class Trained(NamedTuple):
    """What training makes."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    clip: CLIP | None  # the text encoder and, beside it, the image encoder that it was trained with; None with `train_text`


# How a caller runs a stage: it is given the stage's generator and its name, and returns what the generator returns.
Run = Callable[[Iterator[Progress], str], object]


def train_parts(
    recipe: Recipe, dataset: Dataset, run: Run, folder: Path | None = None, world: World | None = None, how: str = "ddp",
    thrifty: bool = False,
) -> Trained:  # fmt: skip
    """Trains autoencoder, text encoder and U-Net from nothing.

    Several processes share every batch of every stage, and all return the same networks, whole.

    Args:
        recipe: what to build and how long to train it.
        dataset: pictures with captions.
        run: drives each stage; `watch` shows a bar.
        folder: for checkpoints, from which an interrupted run goes on; None for none.
        world: the processes that train together, and where; None for one alone, on the best device there is.
        how: as in `parallel`, for the U-Net; the others are small, and every process holds all of them.
        thrifty: whether to `recompute` the U-Net's activations in place of keeping them.

    Raises:
        ValueError: several processes, and a recipe that trains the text encoder along.
    """
    world = world or World(device=best_device())
    if recipe.train_text and world.size > 1:
        raise ValueError(f"this recipe trains the text along, in 1 process: start it without torchrun, not as {world.size}")
    device = world.device
    torch.manual_seed(recipe.first.seed)
    vae = AutoencoderKL(recipe.vae).to(device)
    run(train_autoencoder(vae, dataset, recipe.first, folder and folder / "autoencoder", world), "autoencoder")
    latents = run(cache_latents(vae, dataset, recipe.pictures, world=world), "encoding")
    vae.cfg = replace(vae.cfg, scaling_factor=latents.scaling_factor)

    tokenizer = Tokenizer.train(latents.captions, recipe.vocab_size, context_length=recipe.context_length, lowercase=True)
    ids = _tokenise(tokenizer, latents.captions)
    torch.manual_seed(recipe.words.seed)
    words = replace(TextConfig.tiny(tokenizer.vocab_size, recipe.context_length), end_id=tokenizer.end_id)
    if recipe.train_text:
        clip, text = None, TextEncoder(words).to(device)
    else:
        clip = CLIP(words, ImageConfig.tiny(dataset.size)).to(device)
        run(train_clip(clip, dataset, ids, recipe.words, folder and folder / "clip", world), "text encoder")
        text = clip.text

    torch.manual_seed(recipe.second.seed)
    unet = UNet(recipe.unet).to(device)
    schedule = SCHEDULES[recipe.schedule]().zero_terminal_snr()
    drawn = schedule if recipe.times_mean is None else Crowded(schedule.alpha_bar, recipe.times_mean)
    stage = train_diffusion(
        recompute(unet) if thrifty else unet, text, drawn, latents, ids, tokenizer([""]), recipe.second,
        folder and folder / "diffusion", prediction_type=recipe.prediction_type, dropout=recipe.dropout,
        world=world, how=how, train_text=recipe.train_text,
    )  # fmt: skip
    run(stage, "diffusion")
    if world.size > 1 and how == "fsdp":
        pieces, unet = unet, UNet(recipe.unet).to(device)
        unet.load_state_dict(whole(pieces.state_dict()))
    return Trained(unet, vae, text, tokenizer, schedule, clip)


def _tokenise(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """All captions as rows of ids, with one warning for all that are too long."""
    with warnings.catch_warnings(record=True) as too_long:
        warnings.simplefilter("always")
        ids = tokenizer(captions)
    if too_long:
        said = f"{len(too_long)} of {len(captions)} captions are longer than {tokenizer.context_length} tokens and were cut"
        warnings.warn(f"{said}; the first: {too_long[0].message}", stacklevel=3)
    return ids


def train_judge(judge: Judge, cfg: Fit, folder: Path | None = None) -> Iterator[Progress]:
    """Teaches a judge to read Shapes, held-out combinations too, through blur and noise as a generator might leave them."""
    pictures = Shapes(size=judge.size, objects=judge.objects, seed=1_000_000, split="all")
    device = next(judge.parameters()).device

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        drawn = pictures.draw(range(step * cfg.batch_size, (step + 1) * cfg.batch_size))
        x, blur = drawn.images, torch.rand(1, generator=generator).item()
        if blur > 0.4:
            x = gaussian_blur(x, kernel_size=[5, 5], sigma=[1.8 * (blur - 0.4) + 0.05] * 2)
        grain = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
        x = x + grain * torch.randn(x.shape, generator=generator)
        return judge.loss(x.to(device), from_one_side(drawn.attributes)[0].to(device)), {}

    yield from fit(judge, loss_at, cfg, folder)


def judge_accuracy(judge: Judge, count: int = 4000) -> float:
    """The share of fresh, clean renders of which a judge reads every attribute right."""
    drawn = Shapes(size=judge.size, objects=judge.objects, seed=2_000_000, split="all").draw(range(count))
    return caption_accuracy(judge.read(drawn.images), drawn.attributes).all_correct


def train_features(features: VGGFeatures, dataset: Dataset, cfg: Fit, folder: Path | None = None) -> Iterator[Progress]:
    """Teaches features by one question: which picture of the set is this, turned, moved, tinted and grained?

    No labels are needed (Dosovitskiy et al. 2014).  Blur is not among the changes: what learns to see through it cannot
    measure it.
    """
    device = next(features.parameters()).device
    channels = [layer.out_channels for layer in features.features if isinstance(layer, nn.Conv2d)][-1]
    which = nn.Linear(16 * channels, len(dataset)).to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = torch.randint(len(dataset), (cfg.batch_size,), generator=generator)
        x = _changed(dataset.batch(picks.tolist())[0], generator).to(device)
        seen = F.adaptive_avg_pool2d(features(x)[-1], 4).flatten(1)  # (B, 16 C)
        return F.cross_entropy(which(seen), picks.to(device)), {}

    yield from fit(nn.ModuleList([features, which]), loss_at, cfg, folder)


def _changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, 3, H, W) turned by up to 14 degrees, mirrored or not, moved, resized, tinted and grained."""
    turn, zoom, right, down, mirror, grain = torch.rand(6, len(x), generator=generator) - 0.5
    turn, zoom = 0.5 * turn, 1 + 0.3 * zoom
    side = zoom * mirror.sign()
    rows = [side * turn.cos(), -zoom * turn.sin(), 0.3 * right, side * turn.sin(), zoom * turn.cos(), 0.3 * down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # white where there was nothing
    gain, shift = torch.rand(2, len(x), 3, 1, 1, generator=generator) - 0.5
    noise = torch.randn(x.shape, generator=generator)
    return moved * (1 + 0.3 * gain) + 0.3 * shift + 0.1 * (grain + 0.5).view(-1, 1, 1, 1) * noise
