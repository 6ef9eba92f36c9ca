"""What is trained, and on what loss: the autoencoder, CLIP, and the diffusion that listens to it.

Each is a generator with one yield a step, driven by `loop.fit`.
"""

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.clip import CLIP, TextEncoder, contrastive_loss
from minildm.distributed import World, parallel
from minildm.flow import FlowPath
from minildm.latents import Dataset, Latents
from minildm.loop import Fit, Progress, fit, learning_rate, step_generator, watch  # noqa: F401
from minildm.machine import conv_format
from minildm.schedule import NoiseSchedule
from minildm.unet import UNet
from minildm.vae import AutoencoderKL, vae_loss


def train_autoencoder(
    vae: AutoencoderKL, dataset: Dataset, cfg: Fit, folder: Path | None = None, world: World | None = None, **loss: float
) -> Iterator[Progress]:
    """First stage: teaches an autoencoder to give pictures back.

    Args:
        vae: changed in place.
        dataset: where the pictures come from; each process reads its share of a batch alone.
        cfg: how long and how boldly.
        folder: for checkpoints, or None.
        world: the processes that train together.
        loss: weights passed on to `vae_loss`.
    """
    device, world = next(vae.parameters()).device, world or World()
    model = parallel(vae.to(memory_format=conv_format(device)), world)

    def loss_at(step: int, share: World = world) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = share.share(torch.randint(len(dataset), (cfg.batch_size,), generator=generator)).tolist()
        x = dataset.batch(picks)[0].to(device, memory_format=conv_format(device))
        latent = vae.cfg.latent_channels, *(side // vae.cfg.downsampling for side in x.shape[2:])
        torch.randn(share.rank * len(x), *latent, generator=generator)  # the noise of the shares before this one
        recon, posterior = model(x, generator)
        return vae_loss(x, recon, posterior, **loss)

    yield from fit(model, loss_at, cfg, folder, world)


def train_clip(
    clip: CLIP, dataset: Dataset, ids: Tensor, cfg: Fit, folder: Path | None = None, world: World | None = None
) -> Iterator[Progress]:
    """Teaches a text and an image encoder to find each other's caption and picture in a crowd.  Radford et al. 2021.

    Several processes each embed their share of a batch and lend it to the others: all compute the loss of the whole crowd.

    Args:
        clip: changed in place; its text encoder is what the diffusion will listen to.
        dataset: captioned pictures, at the image encoder's size.
        ids: the captions of the first N pictures, tokenised, (N, L): the ones to train on.
        cfg: how long and how boldly; the batch is the crowd.
        folder: for checkpoints, or None.
        world: the processes that train together.

    Raises:
        ValueError: a batch is to be taken in parts, one after the other, which would never meet.
    """
    device, world = next(clip.parameters()).device, world or World()
    if cfg.accumulate > 1:
        takes = f"{world.size} process{'es' * (world.size > 1)}, 1 part, not {world.size} and {cfg.accumulate}"
        raise ValueError(f"this training cannot cut a batch: it takes {takes}")
    model = parallel(clip, world)

    def loss_at(step: int, share: World = world) -> tuple[Tensor, dict[str, Tensor]]:
        picks = share.share(torch.randint(len(ids), (cfg.batch_size,), generator=step_generator(cfg.seed, step)))
        x = dataset.batch(picks.tolist())[0].to(device)
        image, text = (share.gather(embedded.float()) for embedded in model(x, ids[picks].to(device)))
        return contrastive_loss(image, text, clip.logit_scale), {}

    yield from fit(model, loss_at, cfg, folder, world)


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, dataset: Dataset, count: int, batch_size: int = 128, world: World | None = None
) -> Generator[Progress, None, Latents]:
    """Encodes the first `count` pictures of a dataset; returns them as `Latents`.

    Several processes take the batches in turn and exchange what comes of them: each picture is encoded once, and all processes
    have all latents, since each draws whole batches.
    """
    device, world = next(vae.parameters()).device, world or World()
    means, stds, captions = [], [], []
    count, together = min(count, len(dataset)), batch_size * world.size
    for start in range(0, count, together):
        batch = range(start, min(start + together, count))
        own = batch[world.rank * batch_size : (world.rank + 1) * batch_size]
        x, words = dataset.batch(own or batch[:1])  # at the end there may be none left: then one, which is not given away
        posterior = vae.encode(x.to(device, memory_format=conv_format(device)))
        means.append(world.gather(posterior.mean[: len(own)].float()).cpu().contiguous())
        stds.append(world.gather(posterior.std[: len(own)].float()).cpu().contiguous())
        captions += world.gather_texts(words[: len(own)])
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
    noisy = schedule.add_noise(x0, noise, t).to(device, memory_format=conv_format(device))
    pred = unet(noisy, t.to(device), **condition)
    target = schedule.target(x0, noise, t, prediction_type).to(device)
    error = F.mse_loss(pred.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        error = error * schedule.min_snr_weight(t, prediction_type, min_snr_gamma).to(error)
    return error


def train_diffusion(
    unet: UNet, text: TextEncoder, schedule: NoiseSchedule | FlowPath, latents: Latents, ids: Tensor, empty: Tensor, cfg: Fit,
    folder: Path | None = None, *, prediction_type: str = "v_prediction", dropout: float = 0.1,
    min_snr_gamma: float | None = None, world: World | None = None, how: str = "ddp", train_text: bool = False,
) -> Iterator[Progress]:  # fmt: skip
    """Second stage: teaches a U-Net to denoise latents, while a finished text encoder tells it what they show.

    Args:
        unet: changed in place; of its weights those that want a gradient are trained.  Or a DiT.
        text: only listened to; unless `train_text`: then it learns with the U-Net, in one process.
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
    device, world = next(unet.parameters()).device, world or World()
    text.eval()
    if train_text and world.size > 1:
        raise ValueError(f"the text encoder can be trained along by 1 process, not by {world.size}: train it before")
    model = parallel(unet.to(memory_format=conv_format(device)), world, how)

    def loss_at(step: int, share: World = world) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = torch.randint(len(latents.captions), (cfg.batch_size,), generator=generator)
        x0 = latents.sample(picks, generator)
        noise = torch.randn(x0.shape, generator=generator)
        t = schedule.draw(cfg.batch_size, generator)
        silent = torch.rand(cfg.batch_size, generator=generator) < dropout
        words = torch.where(silent[:, None], empty, ids[picks])
        x0, noise, t, words = map(share.share, (x0, noise, t, words))  # until here all processes have drawn the same
        with torch.set_grad_enabled(train_text):
            hidden, pooled = text(words.to(device))
        condition = {"context": hidden} | ({"pooled": pooled} if unet.cfg.pooled_dim else {})
        return diffusion_loss(model, schedule, x0, noise, t, condition, prediction_type, min_snr_gamma).mean(), {}

    yield from fit(nn.ModuleList([model, text]) if train_text else model, loss_at, cfg, folder, world)
