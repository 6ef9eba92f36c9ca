"""Samplers: from noise to latents, each a plain function of a model, a schedule and a starting noise.

A sampler knows nothing of networks: it calls `model(x, t) -> prediction` and does arithmetic on what comes back.  All of them
take the same arguments, start from standard normal noise and return clean latents, so that one can be swapped for another.

Between two calls of the model all is linear: x0, epsilon and the next x are so much of x plus so much of the prediction.  The
formulas below act on these coefficients, for all steps at once; what is left for a step of ddim, ddpm and euler is one product
and one sum.  (`x.add(y, alpha=c)` is x + c * y in one operation, where there would be two.)
"""

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from minildm.schedule import NoiseSchedule, check_prediction_type

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, int, Tensor, Tensor], None]

_X = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device="cpu")  # the coefficients of x itself: 1 of x, none of the rest


@torch.no_grad()
def ddim(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, eta: float = 0.0, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by jumping from one noise level to a much lower one along the predicted x0.  Song et al. 2021a, eqs. 12 and 16.

    Args:
        model: called as model(x, t) with x (B, C, H, W) of about unit variance and t (B,) int64; returns a prediction like x,
            each time in another tensor, and leaves x and t as they are.
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
        FloatingPointError: the model's output holds a NaN or an infinity, which is looked for at steps 0, 1, 4, 16, 64 and 256,
            or the latents do in the end; says where.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}; 0 is deterministic, 1 as noisy as ddpm")
    timesteps = _plan(schedule, schedule.timesteps(steps, spacing), prediction_type, skip)
    a = schedule.alpha_bar[timesteps]
    a_next = torch.cat([a[1:], schedule.alpha_bar[:1]])  # the last step ends at timestep 0, not clean as ddpm's
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
    x0 = _coefficients(schedule.to_x0, timesteps, prediction_type)
    epsilon = _coefficients(schedule.to_epsilon, timesteps, prediction_type)
    x_next = a_next.sqrt() * x0 + (1 - a_next - variance).sqrt() * epsilon
    return _walk(model, x, schedule, timesteps, prediction_type, x_next, variance, generator, callback)


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
    timesteps = _plan(schedule, schedule.timesteps(steps, spacing), prediction_type).flip(0)
    here, a_next = torch.cat([timesteps.new_zeros(1), timesteps[:-1]]), schedule.alpha_bar[timesteps]
    clean = _coefficients(schedule.to_x0, here, prediction_type)  # x is split at the level that it is on,
    epsilon = _coefficients(schedule.to_epsilon, here, prediction_type)
    x_next = a_next.sqrt() * clean + (1 - a_next).sqrt() * epsilon
    return _walk(model, x0, schedule, timesteps, prediction_type, x_next)  # and the model is told the one that it goes to


@torch.no_grad()
def ddpm(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by drawing each less noisy x from its posterior given the predicted x0.  Ho et al. 2020, eqs. 6 and 7.

    With steps = T this is the paper's algorithm 2 with its smaller variance; with fewer, the same between visited timesteps.

    Args and Raises: as ddim.
    """
    timesteps = _plan(schedule, schedule.timesteps(steps, spacing), prediction_type, skip)
    a = schedule.alpha_bar[timesteps]
    a_next = torch.cat([a[1:], a.new_ones(1)])
    beta = 1 - a / a_next  # of the whole jump from a_next to a
    x0 = _coefficients(schedule.to_x0, timesteps, prediction_type)
    mean = a_next.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - a_next) / (1 - a) * _X
    variance = (1 - a_next) / (1 - a) * beta
    return _walk(model, x, schedule, timesteps, prediction_type, mean, variance, generator, callback)


@torch.no_grad()
def euler(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample by following the slope, epsilon, in straight lines to sigma = 0.  Karras et al. 2022, section 3.

    It is the slope of x / alpha, picture plus sigma times noise; x itself stays at the scale that the model is used to.

    Args and Raises: as ddim; generator is there for the common signature, nothing is drawn from it.
    """
    timesteps = _plan(schedule, schedule.timesteps(steps, spacing), prediction_type, skip)
    schedule, sigmas, alphas = _sigma_space(schedule, timesteps)
    slope = _coefficients(schedule.to_epsilon, timesteps, prediction_type)
    x_next = alphas[1:] * (_X / alphas[:-1] + sigmas.diff() * slope)
    x = _start(x, alphas[0] * sigmas[0], spacing, skip)
    return _walk(model, x, schedule, timesteps, prediction_type, x_next, callback=callback)


@torch.no_grad()
def heun(
    model: Model, x: Tensor, schedule: NoiseSchedule, steps: int = 50, prediction_type: str = "epsilon",
    spacing: str = "leading", generator: Generators = None, callback: Callback | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """Sample as euler does, but along the mean of the slopes at both ends of a step.  Karras et al. 2022, algorithm 1.

    The model is called 2 * steps - 1 times: the last step, to sigma = 0 where there is no slope, is euler's.

    Args and Raises: as euler.
    """
    timesteps = _plan(schedule, schedule.timesteps(steps, spacing), prediction_type, skip)
    schedule, sigmas, alphas = _sigma_space(schedule, timesteps)
    x, times, is_slope = _start(x, alphas[0] * sigmas[0], spacing, skip), _times(timesteps, x), prediction_type == "epsilon"
    slopes = _coefficients(schedule.to_epsilon, timesteps, prediction_type)
    landings = (alphas[1:] * (_X / alphas[:-1] + sigmas.diff() * slopes)).T.tolist()  # where euler lands
    halves, slopes = (alphas[1:] * sigmas.diff() / 2).tolist(), slopes.T.tolist()
    for i, t in enumerate(timesteps.tolist()):
        prediction = _predict(model, x, times[i], i)
        x0 = schedule.to_x0(prediction, x, t, prediction_type) if callback else None
        slope = prediction if is_slope else _mix(x, prediction, *slopes[i])
        x = _mix(x, prediction, *landings[i])
        if i + 1 < len(timesteps):
            prediction = _predict(model, x, times[i + 1], i)
            there = prediction if is_slope else _mix(x, prediction, *slopes[i + 1])
            x = x.add(there - slope, alpha=halves[i])  # half of the step with the one slope, half with the other
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
    timesteps = _plan(schedule, timesteps_of(dpmpp_2m, schedule, steps, spacing), prediction_type, skip)
    schedule, sigmas, alphas = _sigma_space(schedule, timesteps)
    ratio = sigmas[1:] / sigmas[:-1]  # exp(-h)
    of_xs, of_x0s = (ratio * alphas[1:] / alphas[:-1]).tolist(), (alphas[1:] * (1 - ratio)).tolist()
    aheads = [0.0, *(ratio[1:-1].log() / ratio[:-2].log() / 2).tolist(), 0.0]  # half a stride, in units of the last one
    x0s, x0_before = _coefficients(schedule.to_x0, timesteps, prediction_type).T.tolist(), None
    times = _times(timesteps, x)
    for i, t in enumerate(timesteps.tolist()):
        x0 = _mix(x, _predict(model, x, times[i], i), *x0s[i])
        middle = x0 if x0_before is None else x0_before.lerp(x0, 1 + aheads[i])  # on from x0, by so much of its last change
        x = _mix(x, middle, of_xs[i], of_x0s[i])
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
    timesteps = schedule.timesteps(steps, spacing)
    if sampler is dpmpp_2m and spacing != "trailing" and steps < schedule.T:
        timesteps = schedule.timesteps(steps + 1, spacing)[:-1]  # as the reference: one more, and the cleanest left out
    return timesteps[skip:]


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def _plan(schedule: NoiseSchedule, timesteps: list[int], prediction_type: str, skip: int = 0) -> Tensor:
    """All timesteps but the first few, (steps,) int64, after checking that the kind of prediction means something at each."""
    check_prediction_type(prediction_type)
    if not 0 <= skip < len(timesteps):
        raise ValueError(f"skip must lie in [0, {len(timesteps)}), got {skip}: at least one of the timesteps is to be visited")
    if prediction_type == "epsilon" and schedule.alpha_bar[timesteps[skip]] == 0:
        raise ValueError(
            f'timestep {timesteps[skip]} is pure noise (zero terminal SNR), of which an "epsilon" model can say nothing; '
            'use a model trained with "v_prediction", or spacing="leading", which starts lower'
        )
    return torch.tensor(timesteps[skip:], device="cpu")


def _coefficients(convert: Callable, timesteps: Tensor, prediction_type: str) -> Tensor:
    """How much of x, and how much of the prediction, to_x0 or to_epsilon adds up at each timestep, (2, steps) float64.

    Both are linear: where x is 1 and the prediction 0 they give the one coefficient, where it is the other way round the other.
    """
    x = torch.zeros(2, len(timesteps), dtype=torch.float64, device="cpu")
    x[0] = 1
    prediction = 1 - x
    return convert(prediction.flatten(), x.flatten(), timesteps.repeat(2), prediction_type).view(2, -1)


def _times(timesteps: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Each timestep once for every sample of x, as models are given it, (B,) int64."""
    return timesteps.to(x.device)[:, None].repeat(1, len(x)).unbind()


def _mix(x: Tensor, prediction: Tensor, of_x: float, of_prediction: float) -> Tensor:
    """So much of x plus so much of the prediction, in a tensor of its own."""
    return (x * of_x).add_(prediction, alpha=of_prediction)


def _walk(
    model: Model, x: Tensor, schedule: NoiseSchedule, timesteps: Tensor, prediction_type: str, coefficients: Tensor,
    variance: Tensor | None = None, generator: Generators = None, callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Take every step: to so much of x plus so much of the prediction, the two rows, and fresh noise of the variance."""
    (of_xs, of_predictions), times = coefficients.tolist(), _times(timesteps, x)
    spreads = [0.0] * len(timesteps) if variance is None else variance.sqrt().tolist()
    for i, (t, of_x, of_prediction, spread) in enumerate(zip(timesteps.tolist(), of_xs, of_predictions, spreads, strict=True)):
        prediction = _predict(model, x, times[i], i)
        x_next = _mix(x, prediction, of_x, of_prediction)
        if spread > 0:
            x_next.add_(_noise_like(x, generator), alpha=spread)
        if callback:
            callback(i, t, x_next, schedule.to_x0(prediction, x, t, prediction_type))
        x = x_next
    return _checked(x)


def _predict(model: Model, x: Tensor, t: Tensor, step: int) -> Tensor:
    """Ask the model about every sample, and now and then look whether the answer is one.

    Seldom, for a look costs as much as one of the few operations of a step, and on a GPU it waits for all that goes on.
    """
    prediction = model(x, t)
    if prediction.shape != x.shape:
        raise ValueError(f"the model must return the shape of its input, {tuple(x.shape)}, got {tuple(prediction.shape)}")
    if step in (0, 1, 4, 16, 64, 256) and not _is_finite(prediction):
        raise FloatingPointError(
            f"the model's output holds NaN or Inf at step {step}, timestep {t[0]}; check its weights, or use a wider dtype "
            f"than {prediction.dtype}"
        )
    return prediction if prediction.dtype == x.dtype else prediction.to(x.dtype)


def _is_finite(x: Tensor) -> bool:
    return isfinite(x.sum(dtype=torch.float32))  # one NaN or infinity among them spoils the sum


def _checked(x: Tensor) -> Tensor:
    """What has come out, which must be finite."""
    if not _is_finite(x):
        raise FloatingPointError(
            f"the latents hold NaN or Inf after the last step; check the model's weights, or use a wider dtype than {x.dtype}"
        )
    return x


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device, from one generator or from one for each sample."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"a list of generators must hold one a sample, got {len(generator)} for a batch of {len(x)}")
        return torch.cat([_noise_like(sample, g) for sample, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _sigma_space(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[NoiseSchedule, Tensor, Tensor]:
    """The schedule, its last alpha_bar lifted where it is 0; and sigma and alpha at each timestep, then 0 and 1."""
    if schedule.alpha_bar[-1] == 0:  # sigma would be infinite; 2^-24 makes it 4096, as in the reference
        floor = schedule.alpha_bar[-2:-1].div(2).clamp(max=2**-24)
        schedule = NoiseSchedule(alpha_bar=torch.cat([schedule.alpha_bar[:-1], floor]))
    a = torch.cat([schedule.alpha_bar[timesteps], schedule.alpha_bar.new_ones(1)])
    return schedule, ((1 - a) / a).sqrt(), a.sqrt()


def _start(x: Tensor, scale: Tensor, spacing: str, skip: int = 0) -> Tensor:
    """The x to begin with: unit noise times its scale, alpha * sigma, without a picture; or x as it is.

    As it is in "leading", which starts where noise of that scale is clearly too little, and after a skip, where x is no noise.
    """
    return x if skip or spacing == "leading" else x * scale.item()
