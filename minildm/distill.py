"""Progressive distillation: a student learns to go in one step where its teacher goes in two, again and again.

Where the teacher is guided, the student learns the guided path, and afterwards needs no guidance: each of its steps is one
call of the network in place of four.  Salimans & Ho 2022, algorithm 2; for guidance Meng et al. 2023.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.clip import TextEncoder
from minildm.guidance import guided
from minildm.machine import conv_format
from minildm.schedule import NoiseSchedule
from minildm.train import Fit, Latents, Progress, fit, step_generator


def ddim_step(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, schedule: NoiseSchedule, t: Tensor, t_next: Tensor
) -> Tensor:
    """One deterministic step of `ddim`, each sample at a time of its own.  Song et al. 2021a, equation 12.

    Args:
        model: called as model(x, t); predicts the velocity.
        x: noisy latents, (B, C, H, W), at times t.
        schedule: the schedule that the model was trained with.
        t: timesteps, (B,) int64 in [0, T).
        t_next: where to go, (B,) int64 in [0, T).

    Raises:
        ValueError: a time is outside [0, T), or the model's output is not shaped as x.
    """
    prediction = model(x, t)
    x0 = schedule.to_x0(prediction, x, t, "v_prediction")
    return schedule.add_noise(x0, schedule.to_epsilon(prediction, x, t, "v_prediction"), t_next)


def velocity_between(x: Tensor, x_end: Tensor, schedule: NoiseSchedule, t: Tensor, t_end: Tensor) -> Tensor:
    """The velocity that a model must predict at x for one step of `ddim` to end at x_end.  Salimans & Ho 2022, algorithm 2.

    Args:
        x: noisy latents, (B, C, H, W), at times t.
        x_end: the same, less noisy, at times t_end.
        schedule: how much noise there is at each time.
        t: timesteps, (B,) int64 in [0, T).
        t_end: timesteps, (B,) int64, each below its t.

    Raises:
        ValueError: a t_end is not below its t, a time is outside [0, T), or x and x_end differ in shape.
    """
    if not ((t_end >= 0) & (t_end < t) & (t < schedule.T)).all():
        raise ValueError(f"expected 0 <= t_end < t < {schedule.T} for each sample, got t {t.tolist()}, t_end {t_end.tolist()}")
    if x.shape != x_end.shape:
        raise ValueError(f"x and x_end must have one shape, got {tuple(x.shape)} and {tuple(x_end.shape)}")
    shares = [schedule.alpha_bar[time.cpu()].view(-1, *[1] * (x.ndim - 1)) for time in (t, t_end)]  # (B, 1, 1, 1)
    (alpha, sigma), (alpha_end, sigma_end) = ((a.sqrt().to(x), (1 - a).sqrt().to(x)) for a in shares)
    x0 = (sigma * x_end - sigma_end * x) / (sigma * alpha_end - sigma_end * alpha)
    return (alpha * x - x0) / sigma


def distill(
    student: nn.Module,
    teacher: nn.Module,
    text: TextEncoder,
    schedule: NoiseSchedule,
    latents: Latents,
    ids: Tensor,
    cfg: Fit,
    *,
    steps: int,
    empty: Tensor | None = None,
    guidance_scale: float = 1.0,
    folder: Path | None = None,
) -> Iterator[Progress]:
    """One round: afterwards the student's ddim of `steps` steps does what the teacher's does in twice as many.

    Both predict the velocity and are to be sampled with spacing "trailing", of whose timesteps the student visits every other
    one.  For the next round the student is the teacher, without guidance, and half the steps.

    Args:
        student: changed in place; best begun as a copy of the teacher.
        teacher: only asked.
        text: only listened to.
        schedule: the schedule that the teacher was trained with.
        latents: encoded pictures, N of them.
        ids: their captions, tokenised, (N, L).
        cfg: how long and how boldly.
        steps: the student's, at least 1.
        empty: the empty caption, tokenised, (1, L); for guidance.
        guidance_scale: the teacher's; 1 for none.
        folder: for checkpoints, or None.

    Raises:
        ValueError: student and teacher are one network; the steps do not fit the schedule; or guidance without `empty`.
    """
    if student is teacher:
        raise ValueError("student and teacher are one network; begin the student as a copy: copy.deepcopy(teacher)")
    if guidance_scale != 1 and empty is None:
        raise ValueError(f"a guidance scale of {guidance_scale} needs the empty caption: give empty")
    if not 1 <= steps <= schedule.T // 2:
        raise ValueError(f"steps must lie in [1, {schedule.T // 2}], half of the teacher's, got {steps}")
    plan = torch.tensor([*schedule.timesteps(2 * steps, "trailing"), 0])
    device = next(student.parameters()).device
    teacher.eval()
    text.eval()

    def hear(words: Tensor) -> dict[str, Tensor]:
        hidden, pooled = text(words.to(device))
        return {"context": hidden} | ({"pooled": pooled} if student.cfg.pooled_dim else {})

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        picks = torch.randint(len(latents.captions), (cfg.batch_size,), generator=generator)
        x0 = latents.sample(picks, generator)
        start = 2 * torch.randint(steps, (cfg.batch_size,), generator=generator)  # of the teacher's steps, an even one
        t, middle, end = (plan[start + i] for i in range(3))
        x = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        x = x.to(device, memory_format=conv_format(device))
        with torch.no_grad():
            told = hear(ids[picks])
            model = guided(teacher, told, told if empty is None else hear(empty), scale=guidance_scale)
            halfway = ddim_step(model, x, schedule, t.to(device), middle.to(device))
            arrived = ddim_step(model, halfway, schedule, middle.to(device), end.to(device))
            target = velocity_between(x, arrived, schedule, t, end)
        return F.mse_loss(student(x, t.to(device), **told).float(), target), {}

    yield from fit(student.to(memory_format=conv_format(device)), loss_at, cfg, folder)
