"""Training: one loop for everything, as a generator, so that a notebook, a test and the command line drive the same code.

`fit` is given a function from a step's number to that step's loss, and all randomness of step n comes from a generator seeded
by (seed, n).  A run therefore has no hidden state: stopped and resumed, it ends where it would have ended, on a CPU to the bit.
"""

import inspect
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.checkpoint import resume, save_checkpoint
from minildm.clip import CLIP, TextEncoder, contrastive_loss
from minildm.distributed import World, bare, clip, parallel, whole_is_welcome, whole_run, without_exchange
from minildm.flow import FlowPath
from minildm.latents import Latents
from minildm.schedule import NoiseSchedule
from minildm.unet import UNet
from minildm.vae import AutoencoderKL, vae_loss

Result = TypeVar("Result")


class Dataset(Protocol):
    """What training asks of a dataset: its length, and pictures (N, 3, size, size) in [-1, 1] with their captions by number."""

    name: str
    size: int

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> tuple[Tensor, list[str]]: ...


@dataclass(frozen=True)
class Fit:
    """How long and how boldly to train."""

    steps: int
    lr: float  # peak learning rate; it rises over `warmup` steps and falls along a cosine to zero
    batch_size: int = 32
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_norm: float = 1.0  # longer gradients are shortened to this
    ema: float = 0.999  # decay of the averaged weights; 0 keeps none
    seed: int = 0
    save_every: int = 500  # steps between checkpoints, where a folder is given
    accumulate: int = 1  # equal parts of a batch that go through the model one after the other


@dataclass(frozen=True)
class Progress:
    """One step, done."""

    step: int  # counted from 1
    steps: int
    loss: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one training step: a CPU generator that depends on seed and step alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + 1) % 2**63)


def learning_rate(step: int, cfg: Fit) -> float:
    """Linear warm-up, then half a cosine to zero.  Loshchilov & Hutter 2017, equation 5."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup))
    return cfg.lr * rise * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def fit(
    model: nn.Module,
    loss_at: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    cfg: Fit,
    folder: Path | None = None,
    world: World | None = None,
) -> Iterator[Progress]:
    """Trains a model, one yield a step; at the end the model holds the averaged weights.

    Args:
        model: whatever `loss_at` computes with; changed in place.  One from `parallel` where there are several processes.
        loss_at: from a step's number, counted from 0, to its loss (a scalar) and named parts of it for display.  Where steps
            are taken in parts, it is asked for `loss_at(step, share)`: the mean loss over `share.share(batch)` alone.
        cfg: how long and how boldly.
        folder: where checkpoints go and where an earlier run of the same settings is taken up again; None for neither.  All
            processes must see it, and the first of them writes.
        world: the processes that train this model together, as `join` returns it; None for one alone.

    Raises:
        FloatingPointError: the loss or its gradient is not a number any more; says at which step, and what to do.
        ValueError: the folder holds a run of another model or with other settings, or `loss_at` knows no shares.
    """
    world = world or World()
    shares = [world.part(k, cfg.accumulate) for k in range(cfg.accumulate)]
    alone = shares == [World(device=world.device)]
    if not alone and len(inspect.signature(loss_at).parameters) < 2:
        raise ValueError(f"this training cannot cut a batch: it takes 1 process, 1 part, not {world.size} and {cfg.accumulate}")
    parameters = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    settings = json.loads(json.dumps(asdict(cfg)))  # as a checkpoint will give them back
    del settings["accumulate"]  # in how many parts, and by how many processes, is no setting of a run: it may change midway
    with whole_is_welcome(world):
        start = resume(folder, settings, bare(model), average, optimizer) if folder else 0
    world.agree(start, "the step of the newest checkpoint")
    device = next(iter(parameters.values())).device
    model.train()
    for step in range(start, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for share in shares:
            with without_exchange(model, share != shares[-1]):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                    loss, parts = loss_at(step) if alone else loss_at(step, share)
                (loss / len(shares)).backward()
            losses.append({**parts, "": loss.detach()})
        means = {name: world.mean(sum(part[name] for part in losses) / len(losses)) for name in losses[0]}
        value, length = means.pop(""), clip(parameters.values(), cfg.max_norm)
        if not (math.isfinite(value) and math.isfinite(length)):
            raise FloatingPointError(
                f"the loss is {value} and its gradient {length} at step {step + 1} of {cfg.steps}, with a learning rate of "
                f"{learning_rate(step, cfg):.2g}: lower it, or try another seed; checkpoints from before are kept"
            )
        optimizer.step()
        decay = min(cfg.ema, (1 + step) / (10 + step))  # young averages forget faster
        for name, p in parameters.items():
            average[name].lerp_(p.detach(), 1 - decay)
        done = step + 1
        if folder and (done % cfg.save_every == 0 or done == cfg.steps):
            run = whole_run(bare(model), average, optimizer)
            if world.rank == 0:
                save_checkpoint(folder, done, settings, *run)
        yield Progress(done, cfg.steps, value, means)
    if cfg.ema:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(average[name])
    model.eval()


def watch(progress: Generator[Progress, None, Result] | Iterator[Progress], label: str, quiet: bool = False) -> Result | None:
    """Runs a training generator to its end behind a progress bar, and returns what it returns."""
    bar = tqdm(desc=label, unit="step", disable=quiet, dynamic_ncols=True)
    while True:
        try:
            p = next(progress)
        except StopIteration as end:
            bar.close()
            return end.value
        except BaseException:
            bar.close()
            raise
        bar.total, bar.n = p.steps, p.step
        if p.loss is not None:
            bar.set_postfix(loss=f"{p.loss:.4f}", refresh=False)
        bar.update(0)


def train_autoencoder(
    vae: AutoencoderKL, dataset: Dataset, cfg: Fit, folder: Path | None = None, **loss: float
) -> Iterator[Progress]:
    """First stage: teaches an autoencoder to give pictures back.

    Args:
        vae: changed in place.
        dataset: where the pictures come from.
        cfg: how long and how boldly.
        folder: for checkpoints, or None.
        loss: weights passed on to `vae_loss`.
    """
    device = next(vae.parameters()).device

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = torch.randint(len(dataset), (cfg.batch_size,), generator=generator).tolist()
        x = dataset.batch(picks)[0].to(device, memory_format=torch.channels_last)
        recon, posterior = vae(x, generator)
        return vae_loss(x, recon, posterior, **loss)

    yield from fit(vae.to(memory_format=torch.channels_last), loss_at, cfg, folder)


def train_clip(clip: CLIP, dataset: Dataset, ids: Tensor, cfg: Fit, folder: Path | None = None) -> Iterator[Progress]:
    """Teaches a text and an image encoder to find each other's caption and picture in a crowd.  Radford et al. 2021.

    Args:
        clip: changed in place; its text encoder is what the diffusion will listen to.
        dataset: captioned pictures, at the image encoder's size.
        ids: the captions of the first N pictures, tokenised, (N, L): the ones to train on.
        cfg: how long and how boldly; the batch is the crowd.
        folder: for checkpoints, or None.
    """
    device = next(clip.parameters()).device

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        picks = torch.randint(len(ids), (cfg.batch_size,), generator=step_generator(cfg.seed, step))
        x = dataset.batch(picks.tolist())[0].to(device)
        image, text = clip(x, ids[picks].to(device))
        return contrastive_loss(image.float(), text.float(), clip.logit_scale), {}

    yield from fit(clip, loss_at, cfg, folder)


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, dataset: Dataset, count: int, batch_size: int = 128
) -> Generator[Progress, None, Latents]:
    """Encodes the first `count` pictures of a dataset; returns them as `Latents`."""
    device = next(vae.parameters()).device
    means, stds, captions = [], [], []
    count = min(count, len(dataset))
    for start in range(0, count, batch_size):
        x, words = dataset.batch(range(start, min(start + batch_size, count)))
        posterior = vae.encode(x.to(device, memory_format=torch.channels_last))
        means.append(posterior.mean.float().cpu().contiguous())
        stds.append(posterior.std.float().cpu().contiguous())
        captions += words
        yield Progress(len(captions), count)
    mean, std = torch.cat(means), torch.cat(stds)
    spread = (mean.var() + std.square().mean()).sqrt().item()  # of samples: what the means vary, and what each adds
    return Latents(mean, std, captions, 1 / spread)


def diffusion_loss(
    unet: nn.Module,
    schedule: NoiseSchedule | FlowPath,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Mapping[str, Tensor],
    prediction_type: str = "v_prediction",
    min_snr_gamma: float | None = None,
) -> Tensor:
    """What every diffusion model here is trained on: the squared error of each sample's prediction, (B,) float32.

    Args:
        unet: called as unet(x, t, **condition); where its input goes, everything goes.
        schedule: how much noise there is at each time.
        x0: clean scaled latents, (B, C, h, w), on the CPU.
        noise: standard normal, like x0.
        t: timesteps, (B,), on the CPU.
        condition: what the model is told, on its device: {"context": (B, L, D)} and, if it wants it, {"pooled": (B, D)}.
        prediction_type: "epsilon", "v_prediction" or "sample"; "flow" for a FlowPath.
        min_snr_gamma: where the weight of clean timesteps is cut off, 5 say; None weighs all alike.  Hang et al. 2023.
    """
    device = condition["context"].device
    noisy = schedule.add_noise(x0, noise, t).to(device, memory_format=torch.channels_last)
    pred = unet(noisy, t.to(device), **condition)
    target = schedule.target(x0, noise, t, prediction_type).to(device)
    error = F.mse_loss(pred.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        error = error * schedule.min_snr_weight(t, prediction_type, min_snr_gamma).to(error)
    return error


def train_diffusion(
    unet: UNet,
    text: TextEncoder,
    schedule: NoiseSchedule | FlowPath,
    latents: Latents,
    ids: Tensor,
    empty: Tensor,
    cfg: Fit,
    folder: Path | None = None,
    *,
    prediction_type: str = "v_prediction",
    dropout: float = 0.1,
    min_snr_gamma: float | None = None,
    world: World | None = None,
    how: str = "ddp",
) -> Iterator[Progress]:
    """Second stage: teaches a U-Net to denoise latents, while a finished text encoder tells it what they show.

    Args:
        unet: changed in place; of its weights those that want a gradient are trained.  Or a DiT.
        text: only listened to.
        schedule: how much noise there is at each timestep.
        latents: encoded pictures, N of them.
        ids: their captions, tokenised, (N, L).
        empty: the empty caption, tokenised, (1, L).
        cfg: how long and how boldly.
        folder: for checkpoints, or None.
        prediction_type, min_snr_gamma: as in `diffusion_loss`.
        dropout: share of the captions replaced by the empty one, in [0, 1]: what guidance needs.  Ho & Salimans 2022.
        world, how: the processes that train together, and how: see `parallel`.  The batch is the one of all together.
    """
    device = next(unet.parameters()).device
    text.eval()
    world = world or World()
    model = parallel(unet.to(memory_format=torch.channels_last), world, how)

    def loss_at(step: int, share: World = world) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = torch.randint(len(latents.captions), (cfg.batch_size,), generator=generator)
        x0 = latents.sample(picks, generator)
        noise = torch.randn(x0.shape, generator=generator)
        t = schedule.draw(cfg.batch_size, generator)
        silent = torch.rand(cfg.batch_size, generator=generator) < dropout
        words = torch.where(silent[:, None], empty, ids[picks])
        x0, noise, t, words = map(share.share, (x0, noise, t, words))  # until here all processes have drawn the same
        with torch.no_grad():
            hidden, pooled = text(words.to(device))
        condition = {"context": hidden} | ({"pooled": pooled} if unet.cfg.pooled_dim else {})
        return diffusion_loss(model, schedule, x0, noise, t, condition, prediction_type, min_snr_gamma).mean(), {}

    yield from fit(model, loss_at, cfg, folder, world)
