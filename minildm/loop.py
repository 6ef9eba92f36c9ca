"""One training loop for everything, as a generator, so that a notebook, a test and the command line drive the same code.

`fit` is given a function from a step's number to that step's loss, and all randomness of step n comes from a generator seeded
by (seed, n).  A run therefore has no hidden state: stopped and resumed, it ends where it would have ended, on a CPU to the bit.
"""

import inspect
import json
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm.auto import tqdm

from minildm.checkpoint import held_back, resume, save_checkpoint
from minildm.distributed import World, bare, clip, whole_is_welcome, whole_run, without_exchange
from minildm.muon import Muon

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fit:
    """How long and how boldly to train."""

    steps: int
    lr: float  # peak learning rate; it rises over `warmup` steps, and falls to zero by the end
    batch_size: int = 32
    warmup: int = 100
    weight_decay: float = 0.01  # of what AdamW moves
    betas: tuple[float, float] = (0.9, 0.99)
    max_norm: float = 1.0  # longer gradients are shortened to this
    ema: float = 0.999  # decay of the averaged weights; 0 keeps none
    seed: int = 0
    save_every: int = 500  # steps between checkpoints, where a folder is given
    muon: float = 0.0  # peak learning rate of `Muon` for matrices, beside `lr` for the rest; 0 leaves all to AdamW
    decay: str = "cosine"  # how the rate falls: "cosine", or "linear", which is better where there is little time
    accumulate: int = 1  # equal parts of a batch that go through the model one after the other

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f'decay is {self.decay!r}; expected "cosine" or "linear"')
        if self.muon < 0 or (self.muon and self.lr <= 0):
            raise ValueError(f"muon is {self.muon} and lr {self.lr}; neither is below 0, and beside muon lr is above it")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; a batch goes through in at least 1 part")


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
    """Linear warm-up, while half a cosine falls to zero (Loshchilov & Hutter 2017, equation 5), or a straight line."""
    rise, share = min(1.0, (step + 1) / max(1, cfg.warmup)), step / cfg.steps
    return cfg.lr * rise * (1 - share if cfg.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


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
    shared = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    optimizer = Muon(parameters, cfg.muon, **shared) if cfg.muon else AdamW(parameters.values(), fused=True, **shared)
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
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        done = step + 1
        saved = folder and (done % cfg.save_every == 0 or done == cfg.steps)
        if saved:
            run = whole_run(bare(model), average, optimizer, world)
            if world.rank == 0:
                save_checkpoint(folder, done, settings, *run)
        try:
            yield Progress(done, cfg.steps, value, means)
        except KeyboardInterrupt:  # from `watch`, between two steps; of several processes each may be at another
            if folder and world.size == 1 and not saved:
                save_checkpoint(folder, done, settings, *whole_run(bare(model), average, optimizer, world))
            raise
    if cfg.ema:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(average[name])
    model.eval()


def watch(progress: Generator[Progress, None, Result] | Iterator[Progress], label: str, quiet: bool = False) -> Result | None:
    """Runs a training to its end behind a bar and returns what it returns; Ctrl-C waits for a checkpoint, pressed twice not."""
    with tqdm(desc=label, unit="step", disable=quiet, dynamic_ncols=True) as bar, held_back() as pressed:
        while True:
            try:
                p = progress.throw(KeyboardInterrupt) if pressed else next(progress)
            except StopIteration as end:
                if pressed:  # while the stage was closing: there is nothing to save, and nothing more is begun
                    raise KeyboardInterrupt from None
                return end.value
            bar.total, bar.n = p.steps, p.step
            if p.loss is not None:
                bar.set_postfix(loss=f"{p.loss:.4f}", refresh=False)
            bar.update(0)
