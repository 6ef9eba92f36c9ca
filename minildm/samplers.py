"""Samplers: from noise to latents, each a plain function of a model, a schedule and a starting noise.

A sampler knows nothing of networks: it calls `model(x, t) -> prediction` and does arithmetic on what comes back.  All of them
take the same arguments, start from standard normal noise and return clean latents, so that one can be swapped for another.
(`x.add(y, alpha=c)` is x + c * y in one operation, where there would be two.)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite, log

import torch
from torch import Tensor

from minildm.schedule import NoiseSchedule, check_prediction_type

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, int, Tensor, Tensor], None]


@torch.no_grad()
def ddim(
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    generator: Generators = None,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Sample by jumping from one noise level to a much lower one along the predicted x0.  Song et al. 2021a, eqs. 12 and 16.

    Args:
        model: called as model(x, t) with x (B, C, H, W) of about unit variance and t (B,) int64; returns a prediction like x.
        x: starting noise, standard normal, (B, C, H, W).
        schedule: the schedule that the model was trained with.
        steps: how many timesteps to visit, in [1, T].
        eta: share of fresh noise at each step, in [0, 1]: 0 is deterministic, 1 has the variance of ddpm.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample".
        spacing: which timesteps to visit: "leading", "trailing" or "linspace"; see NoiseSchedule.timesteps.
        generator: source of the fresh noise; a list of B gives each sample its own, so that no image depends on its batch.
        callback: called after each step as callback(i, t, x, x0): the step, counted from 0; the timestep that the model was
            asked about; the latents now, at the scale that the model is shown; the clean latents as the model sees them.
        skip: how many of the noisiest timesteps to leave out, in [0, steps).  If any, x is not noise but latents noised to the
            first timestep that is visited: schedule.add_noise(latents, noise, timesteps_of(sampler, ...)[0]).

    Returns:
        Clean latents, (B, C, H, W), in x's dtype and on its device.

    Raises:
        ValueError: an argument is out of range or unknown; the model's output is not shaped as x; a list of generators is not
            one a sample; or the model predicts "epsilon" and a timestep to be visited is pure noise (zero terminal SNR).
        FloatingPointError: the model's output holds a NaN or an infinity; says at which step.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}; 0 is deterministic, 1 as noisy as ddpm")
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    levels = schedule.alpha_bar[[*timesteps, 0]].tolist()
    for i, (t, a, a_next) in enumerate(zip(timesteps, levels[:-1], levels[1:], strict=True)):
        prediction = _predict(model, x, t, i)
        x0 = schedule.to_x0(prediction, x, t, prediction_type)
        epsilon = schedule.to_epsilon(prediction, x, t, prediction_type)

        variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        x = (a_next**0.5 * x0).add(epsilon, alpha=(1 - a_next - variance) ** 0.5)
        if variance > 0:
            x = x.add(_noise_like(x, generator), alpha=variance**0.5)
        if callback:
            callback(i, t, x, x0)
    return x


@torch.no_grad()
def ddim_invert(
    model: Model,
    x0: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
) -> Tensor:
    """Run ddim backwards, from clean latents to the noise that ddim turns into them.  Song et al. 2021a, section 4.3.

    Each step trusts that the model says the same of x before and after it, so the way back is close, not exact: the error falls
    as 1 / steps.

    Args:
        model: as in ddim.
        x0: clean latents, (B, C, H, W).
        schedule, steps, prediction_type, spacing: as in the ddim that is to return to x0.

    Returns:
        The starting noise, (B, C, H, W).

    Raises:
        ValueError, FloatingPointError: as ddim.
    """
    x = x0
    timesteps = _plan(schedule, steps, spacing, prediction_type)[::-1]
    for i, (t, t_next) in enumerate(pairwise([0, *timesteps])):
        a_next = schedule.alpha_bar[t_next].item()
        prediction = _predict(model, x, t_next, i)  # asked where ddim will ask, of an x still a step cleaner
        x0 = schedule.to_x0(prediction, x, t, prediction_type)
        epsilon = schedule.to_epsilon(prediction, x, t, prediction_type)
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * epsilon
    return x


@torch.no_grad()
def ddpm(
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    generator: Generators = None,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Sample by drawing each less noisy x from its posterior given the predicted x0.  Ho et al. 2020, eqs. 6 and 7.

    With steps = T this is the paper's algorithm 2 with its smaller variance; with fewer, the same between visited timesteps.

    Args and Raises: as ddim.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    levels = [*schedule.alpha_bar[timesteps].tolist(), 1.0]
    for i, (t, a, a_next) in enumerate(zip(timesteps, levels[:-1], levels[1:], strict=True)):
        x0 = schedule.to_x0(_predict(model, x, t, i), x, t, prediction_type)

        beta = 1 - a / a_next  # of the whole jump from a_next to a
        x = ((a / a_next) ** 0.5 * (1 - a_next) / (1 - a) * x).add(x0, alpha=a_next**0.5 * beta / (1 - a))
        variance = (1 - a_next) / (1 - a) * beta
        if variance > 0:
            x = x.add(_noise_like(x, generator), alpha=variance**0.5)
        if callback:
            callback(i, t, x, x0)
    return x


@torch.no_grad()
def euler(
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    generator: Generators = None,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Sample by following the slope, dx / dsigma = epsilon, in straight lines to sigma = 0.  Karras et al. 2022, section 3.

    In this space x is picture plus sigma times noise; divided by sqrt(sigma^2 + 1) it is what the model is used to.

    Args and Raises: as ddim; generator is there for the common signature, nothing is drawn from it.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    x = x * _start_scale(sigmas[0], spacing, skip)
    for i, (t, sigma, sigma_next) in enumerate(zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)):
        x_in = x / (sigma**2 + 1) ** 0.5
        prediction = _predict(model, x_in, t, i)
        slope = schedule.to_epsilon(prediction, x_in, t, prediction_type)
        x = x.add(slope, alpha=sigma_next - sigma)
        if callback:
            x0 = schedule.to_x0(prediction, x_in, t, prediction_type)
            callback(i, t, x / (sigma_next**2 + 1) ** 0.5, x0)
    return x


@torch.no_grad()
def heun(
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    generator: Generators = None,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Sample as euler does, but along the mean of the slopes at both ends of a step.  Karras et al. 2022, algorithm 1.

    The model is called 2 * steps - 1 times: the last step, to sigma = 0 where there is no slope, is euler's.

    Args and Raises: as euler.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    x = x * _start_scale(sigmas[0], spacing, skip)
    for i, (t, sigma, sigma_next) in enumerate(zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)):
        x_in = x / (sigma**2 + 1) ** 0.5
        prediction = _predict(model, x_in, t, i)
        x0 = schedule.to_x0(prediction, x_in, t, prediction_type) if callback else None
        slope = schedule.to_epsilon(prediction, x_in, t, prediction_type)
        if sigma_next > 0:
            t_next = timesteps[i + 1]
            x_in = x.add(slope, alpha=sigma_next - sigma) / (sigma_next**2 + 1) ** 0.5  # where euler would land
            prediction = _predict(model, x_in, t_next, i)
            slope = slope.lerp(schedule.to_epsilon(prediction, x_in, t_next, prediction_type), 0.5)  # their mean
        x = x.add(slope, alpha=sigma_next - sigma)
        if callback:
            callback(i, t, x / (sigma_next**2 + 1) ** 0.5, x0)
    return x


@torch.no_grad()
def dpmpp_2m(
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    generator: Generators = None,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Sample by extrapolating the last two predictions of x0, second order for one call a step.  Lu et al. 2022b, algorithm 2.

    Time is measured in lambda = log(alpha / sigma), so exp(-h) is the ratio of two sigmas.  The first step has no past and the
    last no future (lambda is infinite at sigma = 0): both are of first order.

    Args and Raises: as euler.
    """
    _plan(schedule, steps, spacing, prediction_type, skip)  # for its checks
    timesteps = timesteps_of(dpmpp_2m, schedule, steps, spacing, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    alphas = [(sigma**2 + 1) ** -0.5 for sigma in sigmas]
    x0_before = None
    for i, t in enumerate(timesteps):
        x0 = schedule.to_x0(_predict(model, x, t, i), x, t, prediction_type)
        ratio = sigmas[i + 1] / sigmas[i]  # exp(-h)
        if 0 < i < len(timesteps) - 1:
            r = log(sigmas[i - 1] / sigmas[i]) / -log(ratio)  # the last stride in units of this one
            target = x0.add(x0 - x0_before, alpha=1 / (2 * r))
        else:
            target = x0
        x = (ratio * alphas[i + 1] / alphas[i] * x).add(target, alpha=alphas[i + 1] * (1 - ratio))
        x0_before = x0
        if callback:
            callback(i, t, x, x0)
    return x


def timesteps_of(sampler: Callable, schedule: NoiseSchedule, steps: int, spacing: str = "leading", skip: int = 0) -> list[int]:
    """The timesteps that a sampler asks the model about, noisiest first.

    Args:
        sampler: ddim, ddpm, euler, heun or dpmpp_2m, which visits others than the rest where the spacing is not "trailing".
        schedule, steps, spacing, skip: what the sampler is given; errors as there.
    """
    if sampler is dpmpp_2m and spacing != "trailing" and steps < schedule.T:
        return schedule.timesteps(steps + 1, spacing)[skip:-1]  # as the reference: one more, and the cleanest left out
    return schedule.timesteps(steps, spacing)[skip:]


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def _plan(schedule: NoiseSchedule, steps: int, spacing: str, prediction_type: str, skip: int = 0) -> list[int]:
    """The timesteps to visit, noisiest first, after checking that the model's kind of prediction means something at each."""
    check_prediction_type(prediction_type)
    timesteps = schedule.timesteps(steps, spacing)[skip:]
    if not 0 <= skip < steps:
        raise ValueError(f"skip must lie in [0, {steps}), got {skip}: at least one of the {steps} timesteps is to be visited")
    if prediction_type == "epsilon" and schedule.alpha_bar[timesteps[0]] == 0:
        raise ValueError(
            f'timestep {timesteps[0]} is pure noise (zero terminal SNR), of which an "epsilon" model can say nothing; '
            'use a model trained with "v_prediction", or spacing="leading", which starts lower'
        )
    return timesteps


def _predict(model: Model, x: Tensor, t: int, step: int) -> Tensor:
    """Ask the model about every sample at one timestep, and stop at an answer that could only spoil the picture."""
    prediction = model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
    if prediction.shape != x.shape:
        raise ValueError(f"the model must return the shape of its input, {tuple(x.shape)}, got {tuple(prediction.shape)}")
    if not isfinite(prediction.sum(dtype=torch.float32)):  # one NaN or infinity among them spoils the sum
        raise FloatingPointError(
            f"the model's output holds NaN or Inf at step {step}, timestep {t}; check its weights, or use a wider dtype than "
            f"{prediction.dtype}"
        )
    return prediction if prediction.dtype == x.dtype else prediction.to(x.dtype)


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device, from one generator or from one for each sample."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"a list of generators must hold one a sample, got {len(generator)} for a batch of {len(x)}")
        return torch.cat([_noise_like(sample, g) for sample, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _sigma_space(schedule: NoiseSchedule, timesteps: list[int]) -> tuple[NoiseSchedule, list[float]]:
    """Noise per unit of picture at each timestep, then 0; and the schedule, with a last alpha_bar that is 0 made 2^-24."""
    if schedule.alpha_bar[-1] == 0:  # sigma would be infinite; the reference puts the same floor, 4096
        floor = schedule.alpha_bar[-2:-1].div(2).clamp(max=2**-24)
        schedule = NoiseSchedule(alpha_bar=torch.cat([schedule.alpha_bar[:-1], floor]))
    return schedule, [*(1 / schedule.snr(torch.tensor(timesteps))).sqrt().tolist(), 0.0]


def _start_scale(sigma: float, spacing: str, skip: int = 0) -> float:
    """What x is multiplied by at the start: unit noise by sigma; by sqrt(sigma^2 + 1) where it stands for noised latents.

    It does so after a skip, and in "leading", which starts where some picture should be left: ddim takes it for that, too.
    """
    return (sigma**2 + 1) ** 0.5 if skip or spacing == "leading" else sigma
