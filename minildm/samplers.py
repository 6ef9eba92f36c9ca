"""Samplers: from noise to latents, each a plain function of a model, a schedule and a starting noise.

A sampler knows nothing of networks: it calls `model(x, t) -> prediction` and does arithmetic on what comes back.  All of them
take the same arguments, start from standard normal noise and return clean latents, so that one can be swapped for another.

Between two calls of the model all is linear: x0, epsilon and the next x are so much of x and so much of the prediction.  How
much is numbers, worked out for all steps beforehand; on the tensors a step is then one product and one sum.
(`x.add(y, alpha=c)` is x + c * y in one operation, where there would be two.)
"""

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from minildm.schedule import NoiseSchedule, check_prediction_type

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, int, Tensor, Tensor], None]

X = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device="cpu")  # x itself in numbers: all of it, none of the prediction


@torch.no_grad()
def ddim(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, eta: float = 0.0, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
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
        FloatingPointError: the model's first output, or what all steps have come to, holds a NaN or an infinity; says which.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}; 0 is deterministic, 1 as noisy as ddpm")
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    a, a_next = schedule.alpha_bar[timesteps], schedule.alpha_bar[[*timesteps[1:], 0]]
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
    x0 = _in_numbers(schedule.to_x0, timesteps, prediction_type)
    epsilon = _in_numbers(schedule.to_epsilon, timesteps, prediction_type)
    step = a_next.sqrt() * x0 + (1 - a_next - variance).sqrt() * epsilon
    return _walk(model, x, schedule, timesteps, prediction_type, step, variance, generator, callback)


@torch.no_grad()
def ddim_invert(
    model: Model, x0: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading",
) -> Tensor:  # fmt: skip
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
    timesteps = _plan(schedule, steps, spacing, prediction_type)[::-1]
    x, a_next, left = x0, schedule.alpha_bar[timesteps], [0, *timesteps[:-1]]
    x0 = _in_numbers(schedule.to_x0, left, prediction_type)
    epsilon = _in_numbers(schedule.to_epsilon, left, prediction_type)
    step = a_next.sqrt() * x0 + (1 - a_next).sqrt() * epsilon
    return _walk(model, x, schedule, timesteps, prediction_type, step)  # asked where ddim asks, of an x still a step cleaner


@torch.no_grad()
def ddpm(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by drawing each less noisy x from its posterior given the predicted x0.  Ho et al. 2020, eqs. 6 and 7.

    With steps = T this is the paper's algorithm 2 with its smaller variance; with fewer, the same between visited timesteps.

    Args and Raises: as ddim.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    a = schedule.alpha_bar[timesteps]
    a_next = torch.cat([a[1:], a.new_ones(1)])
    beta = 1 - a / a_next  # of the whole jump from a_next to a
    x0 = _in_numbers(schedule.to_x0, timesteps, prediction_type)
    mean = (a / a_next).sqrt() * (1 - a_next) / (1 - a) * X + a_next.sqrt() * beta / (1 - a) * x0
    variance = (1 - a_next) / (1 - a) * beta
    return _walk(model, x, schedule, timesteps, prediction_type, mean, variance, generator, callback)


@torch.no_grad()
def euler(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by following the slope, dx / dsigma = epsilon, in straight lines to sigma = 0.  Karras et al. 2022, section 3.

    In this space x is picture plus sigma times noise; divided by sqrt(sigma^2 + 1) it is what the model is used to.

    Args and Raises: as ddim; generator is there for the common signature, nothing is drawn from it.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    alphas = (sigmas**2 + 1).rsqrt()
    slope = _in_numbers(schedule.to_epsilon, timesteps, prediction_type)
    step = alphas[1:] * (X / alphas[:-1] + sigmas.diff() * slope)
    return _walk(model, _start(x, sigmas[0], spacing, skip), schedule, timesteps, prediction_type, step, callback=callback)


@torch.no_grad()
def heun(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample as euler does, but along the mean of the slopes at both ends of a step.  Karras et al. 2022, algorithm 1.

    The model is called 2 * steps - 1 times: the last step, to sigma = 0 where there is no slope, is euler's.

    Args and Raises: as euler.
    """
    timesteps = _plan(schedule, steps, spacing, prediction_type, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    alphas, x, times = (sigmas**2 + 1).rsqrt(), _start(x, sigmas[0], spacing, skip), _times(timesteps, x)
    keeps, strides = (alphas[1:] / alphas[:-1]).tolist(), (alphas[1:] * sigmas.diff()).tolist()
    for i, (t, keep, stride) in enumerate(zip(timesteps, keeps, strides, strict=True)):
        prediction = _predict(model, x, times[i], i)
        x0 = schedule.to_x0(prediction, x, t, prediction_type) if callback else None
        slope, kept = schedule.to_epsilon(prediction, x, t, prediction_type), keep * x
        x = kept.add(slope, alpha=stride)  # where euler lands
        if i + 1 < len(timesteps):
            there = schedule.to_epsilon(_predict(model, x, times[i + 1], i), x, timesteps[i + 1], prediction_type)
            x = kept.add(slope, alpha=stride / 2).add_(there, alpha=stride / 2)
        if callback:
            callback(i, t, x, x0)
    return _checked(x)


@torch.no_grad()
def dpmpp_2m(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by extrapolating the last two predictions of x0, second order for one call a step.  Lu et al. 2022b, algorithm 2.

    Time is measured in lambda = log(alpha / sigma), so exp(-h) is the ratio of two sigmas.  The first step has no past and the
    last no future (lambda is infinite at sigma = 0): both are of first order.

    Args and Raises: as euler.
    """
    _plan(schedule, steps, spacing, prediction_type, skip)  # for its checks
    timesteps = timesteps_of(dpmpp_2m, schedule, steps, spacing, skip)
    schedule, sigmas = _sigma_space(schedule, timesteps)
    alphas, times = (sigmas**2 + 1).rsqrt(), _times(timesteps, x)
    ratio = sigmas[1:] / sigmas[:-1]  # exp(-h)
    half = torch.zeros_like(ratio)  # of a stride, in units of the stride before it
    half[1:-1] = ratio[1:-1].log() / ratio[:-2].log() / 2
    step = torch.stack([ratio * alphas[1:] / alphas[:-1], alphas[1:] * (1 - ratio), half])
    x0_before = None
    for i, (t, of_x, of_x0, ahead) in enumerate(zip(timesteps, *step.tolist(), strict=True)):
        x0 = schedule.to_x0(_predict(model, x, times[i], i), x, t, prediction_type)
        target = x0 if x0_before is None else x0_before.lerp(x0, 1 + ahead)  # x0, and on by as much of its last change
        x = (of_x * x).add_(target, alpha=of_x0)
        x0_before = x0
        if callback:
            callback(i, t, x, x0)
    return _checked(x)


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


def _in_numbers(convert: Callable, timesteps: list[int], prediction_type: str) -> Tensor:
    """What to_x0 or to_epsilon makes at each timestep: so much of x, and so much of the prediction, (2, steps) float64.

    It is linear in the two, and so known by what it is where they are 1 and 0, and where they are 0 and 1.
    """
    x, prediction = torch.eye(2, dtype=torch.float64, device="cpu")[:, None].expand(2, len(timesteps), 2)
    return convert(prediction, x, torch.tensor(timesteps, device="cpu"), prediction_type).T


def _times(timesteps: list[int], x: Tensor) -> tuple[Tensor, ...]:
    """Each timestep once for every sample of x, as models are given it, (B,) int64."""
    return torch.tensor(timesteps, device=x.device)[:, None].repeat(1, len(x)).unbind()


def _walk(
    model: Model, x: Tensor, schedule: NoiseSchedule, timesteps: list[int], prediction_type: str, step: Tensor,
    variance: Tensor | None = None, generator: Generators = None, callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Take every step: to so much of x, so much of the prediction, both in step, and noise of the variance, if any."""
    spreads = [0.0] * len(timesteps) if variance is None else variance.sqrt().tolist()
    for i, (t, of_x, of_prediction, spread) in enumerate(zip(_times(timesteps, x), *step.tolist(), spreads, strict=True)):
        prediction = _predict(model, x, t, i)
        x_next = (of_x * x).add_(prediction, alpha=of_prediction)
        if spread > 0:
            x_next = x_next.add(_noise_like(x, generator), alpha=spread)
        if callback:
            callback(i, timesteps[i], x_next, schedule.to_x0(prediction, x, timesteps[i], prediction_type))
        x = x_next
    return _checked(x)


def _predict(model: Model, x: Tensor, t: Tensor, step: int) -> Tensor:
    """Ask the model about every sample; the first answer is looked through, for most of what is broken shows at once."""
    prediction = model(x, t)
    if prediction.shape != x.shape:
        raise ValueError(f"the model must return the shape of its input, {tuple(x.shape)}, got {tuple(prediction.shape)}")
    if step == 0:
        _checked(prediction, f"the model's output holds NaN or Inf at step 0, timestep {t[0]}")
    return prediction if prediction.dtype == x.dtype else prediction.to(x.dtype)


def _checked(x: Tensor, problem: str = "the latents hold NaN or Inf after the last step, not yet after the first") -> Tensor:
    """The same tensor, which must be finite.  Not asked at every step: a look makes a GPU wait for all that is under way."""
    if not isfinite(x.sum(dtype=torch.float32)):  # one NaN or infinity among them spoils the sum
        raise FloatingPointError(f"{problem}; check the model's weights, or use a wider dtype than {x.dtype}")
    return x


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device, from one generator or from one for each sample."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"a list of generators must hold one a sample, got {len(generator)} for a batch of {len(x)}")
        return torch.cat([_noise_like(sample, g) for sample, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _sigma_space(schedule: NoiseSchedule, timesteps: list[int]) -> tuple[NoiseSchedule, Tensor]:
    """Noise per unit of picture at each timestep, then 0; and the schedule, with a last alpha_bar that is 0 made 2^-24."""
    if schedule.alpha_bar[-1] == 0:  # sigma would be infinite; the reference puts the same floor, 4096
        floor = schedule.alpha_bar[-2:-1].div(2).clamp(max=2**-24)
        schedule = NoiseSchedule(alpha_bar=torch.cat([schedule.alpha_bar[:-1], floor]))
    a = torch.cat([schedule.alpha_bar[timesteps], schedule.alpha_bar.new_ones(1)])
    return schedule, ((1 - a) / a).sqrt()


def _start(x: Tensor, sigma: Tensor, spacing: str, skip: int = 0) -> Tensor:
    """What the model is shown first.  Unit noise is sigma of noise and no picture, at the scale of the model.

    After a skip x stands for noised latents; and in "leading", which starts where some picture should be left, too, as in ddim.
    """
    return x if skip or spacing == "leading" else x * (sigma / (sigma**2 + 1).sqrt()).item()
