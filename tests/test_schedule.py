"""The noise schedule, against the reference library and against its own definition."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from minildm.schedule import PREDICTION_TYPES, SPACINGS, NoiseSchedule

SD = NoiseSchedule.scaled_linear()
SCHEDULES = {
    "scaled_linear": SD,
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_terminal": SD.zero_terminal_snr(),
    "short": NoiseSchedule.scaled_linear(T=40, start=0.01, end=0.3),
}


def reference(schedule, cls=DDPMScheduler, **config):
    scheduler = cls(num_train_timesteps=schedule.T, **config)
    scheduler.alphas_cumprod = schedule.alpha_bar.clone()
    return scheduler


def latents(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_timesteps(schedule):
    """x0, noise and t with one sample for each timestep."""
    return latents(schedule.T, 2, 3, 3), latents(schedule.T, 2, 3, 3, seed=1), torch.arange(schedule.T)


def test_stable_diffusion_levels():
    assert_close(SD.alpha_bar[[0, -1]], torch.tensor([0.99915, 0.0046601], dtype=torch.float64), rtol=0, atol=5e-8)
    sigma = (1 / SD.snr(torch.tensor([0, 999]))).sqrt()
    assert_close(sigma, torch.tensor([0.0292, 14.615], dtype=torch.float64), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (SD, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
    ],
)
def test_constructors_match_reference(schedule, config):
    theirs = DDPMScheduler(**config)  # float32
    assert_close(schedule.betas.float(), theirs.betas, rtol=1e-5, atol=0)
    assert_close(schedule.alpha_bar.float(), theirs.alphas_cumprod, rtol=3e-5, atol=0)


def test_cosine_matches_reference():
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    assert_close(NoiseSchedule.cosine().betas.float(), theirs, rtol=1e-5, atol=1e-7)
    assert_close(NoiseSchedule.cosine().betas.max().item(), 0.999)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_strictly_decreasing_float64(name):
    a = SCHEDULES[name].alpha_bar
    assert a.dtype == torch.float64
    assert a.shape == (SCHEDULES[name].T,)
    assert (a.diff() < 0).all()


def test_zero_terminal_snr_matches_reference():
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(SD.betas), 0)
    ours = SD.zero_terminal_snr().alpha_bar
    assert ours[-1] == 0
    assert_close(ours, theirs, rtol=1e-11, atol=0)
    assert_close(ours[0], SD.alpha_bar[0])
    assert SD.alpha_bar[-1] > 0.004  # a new schedule: the old one is as it was


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_jump_equals_many_small_steps(name):
    schedule = SCHEDULES[name]
    t = torch.arange(schedule.T)
    one, zero = torch.ones(schedule.T, dtype=torch.float64), torch.zeros(schedule.T, dtype=torch.float64)
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in schedule.betas.tolist():  # x <- sqrt(1 - beta) x + sqrt(beta) noise
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    assert_close(schedule.add_noise(one, zero, t), torch.tensor(means, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert_close(schedule.add_noise(zero, one, t) ** 2, torch.tensor(variances, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_and_velocity_match_reference_exactly(name):
    schedule = SCHEDULES[name]
    x0, noise, t = all_timesteps(schedule)
    theirs = reference(schedule)
    assert_close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=0)
    assert_close(schedule.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_undo_the_target_at_every_timestep(name, prediction_type):
    schedule = SCHEDULES[name]
    x0, noise, t = all_timesteps(schedule)
    if prediction_type == "epsilon" and name == "zero_terminal":
        x0, noise, t = x0[:-1], noise[:-1], t[:-1]
    x = schedule.add_noise(x0, noise, t)
    target = schedule.target(x0, noise, t, prediction_type)
    # dividing by sqrt(alpha_bar), which reaches 5e-5 in the cosine schedule, costs digits
    assert_close(schedule.to_x0(target, x, t, prediction_type), x0, rtol=0, atol=1e-10)
    assert_close(schedule.to_epsilon(target, x, t, prediction_type), noise, rtol=0, atol=1e-10)


def test_target_is_what_its_name_says():
    x0, noise, t = all_timesteps(SCHEDULES["short"])
    schedule = SCHEDULES["short"]
    assert schedule.target(x0, noise, t, "epsilon") is noise
    assert schedule.target(x0, noise, t, "sample") is x0
    assert_close(schedule.target(x0, noise, t, "v_prediction"), schedule.velocity(x0, noise, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_keep_the_dtype_of_x(dtype):
    x0, noise = latents(3, 4, 2, 2, dtype=dtype), latents(3, 4, 2, 2, seed=1, dtype=dtype)
    t = torch.tensor([0, 500, 999])
    exact = SD.add_noise(x0.double(), noise.double(), t)
    ours = SD.add_noise(x0, noise, t)
    assert ours.dtype == dtype
    assert_close(ours.double(), exact, rtol=0, atol=10 * torch.finfo(dtype).eps)
    assert SD.to_x0(noise, x0, t).dtype == dtype
    assert SD.to_epsilon(noise, x0, t, "v_prediction").dtype == dtype


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7, 7, 7], dtype=torch.int32), torch.tensor([7] * 3)])
def test_one_timestep_for_all_or_one_each(t):
    x0, noise = latents(3, 4, 3, 3), latents(3, 4, 3, 3, seed=1)
    expected = SD.alpha_bar[7].sqrt() * x0 + (1 - SD.alpha_bar[7]).sqrt() * noise
    assert_close(SD.add_noise(x0, noise, t), expected)


def test_each_sample_gets_its_own_timestep():
    x0, noise = latents(8, 4, 8, 8), latents(8, 4, 8, 8, seed=1)  # 8 along every axis that could be confused
    t = torch.arange(0, 800, 100)
    singly = torch.cat([SD.add_noise(x0[i : i + 1], noise[i : i + 1], int(t[i])) for i in range(8)])
    assert_close(SD.add_noise(x0, noise, t), singly, rtol=0, atol=0)


def test_min_snr_weight_matches_reference():
    t = torch.arange(1000)
    snr = compute_snr(reference(SD), t)
    capped = snr.clamp(max=5)
    for prediction_type, expected in {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}.items():
        weight = SD.min_snr_weight(t, prediction_type)
        assert weight.dtype == torch.float32
        assert_close(weight, expected, rtol=4e-7, atol=2e-7)  # it computes in float32
    assert (SD.min_snr_weight(t, gamma=1.0) <= SD.min_snr_weight(t, gamma=5.0)).all()


def test_min_snr_weight_where_there_is_no_signal():
    schedule = SCHEDULES["zero_terminal"]
    assert [schedule.min_snr_weight(999, p).item() for p in PREDICTION_TYPES] == [1, 0, 0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 4, 5, 8, 10, 20, 25, 50, 100, 250, 500])
def test_timesteps_match_reference(steps, spacing):
    theirs = DDIMScheduler(steps_offset=1, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert SD.timesteps(steps, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 40, 1000])
def test_timesteps_are_in_range_and_descend(T, spacing):
    schedule = NoiseSchedule.linear(T=T)
    for steps in range(1, T + 1):
        timesteps = schedule.timesteps(steps, spacing)
        assert len(timesteps) == steps
        assert all(0 <= t < T for t in timesteps)
        assert all(a > b for a, b in pairwise(timesteps))
    assert timesteps == list(range(T))[::-1]  # all of them
    if spacing != "leading":
        assert schedule.timesteps(1, spacing) == [T - 1]


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SD.alpha_bar = SD.alpha_bar


X, T3 = torch.zeros(3, 4, 2, 2), torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SD.add_noise(X, X, torch.tensor([0, 1, 1000])), r"\[0, 1000\), got values from 0 to 1000"),
        (lambda: SD.add_noise(X, X, -1), r"\[0, 1000\), got values from -1 to -1"),
        (lambda: SD.snr(1000), r"\[0, 1000\)"),
        (lambda: SD.add_noise(X, X, torch.tensor([0.5, 1, 2])), "integers, got torch.float32"),
        (lambda: SD.add_noise(X, X, torch.tensor([1, 2])), r"each of the 3 samples, got shape \(2,\)"),
        (lambda: SD.add_noise(X, X, T3.view(3, 1)), r"got shape \(3, 1\)"),
        (lambda: SD.add_noise(X, X[:1], T3), r"\(3, 4, 2, 2\) and \(1, 4, 2, 2\)"),
        (lambda: SD.to_x0(X[:, :1], X, T3), "one shape"),
        (lambda: SD.to_x0(X, X, T3, "velocity"), "epsilon, v_prediction, sample, got 'velocity'"),
        (lambda: SD.to_epsilon(X, X, T3, "eps"), "epsilon, v_prediction, sample, got 'eps'"),
        (lambda: SD.target(X, X, T3, "eps"), "epsilon, v_prediction, sample, got 'eps'"),
        (lambda: SD.min_snr_weight(T3, "eps"), "epsilon, v_prediction, sample, got 'eps'"),
        (lambda: SD.min_snr_weight(T3, gamma=0), "gamma must be above 0, got 0"),
        (lambda: SCHEDULES["zero_terminal"].to_x0(X, X, torch.tensor([1, 2, 999])), "alpha_bar is 0"),
        (lambda: SCHEDULES["zero_terminal"].to_x0(X, X, 999), "alpha_bar is 0"),
        (lambda: SD.to_x0(X, X, True), "integers, got torch.bool"),
        (lambda: SD.to_x0(X, X, 1000), r"\[0, 1000\), got values from 1000 to 1000"),
        (lambda: SD.timesteps(0), r"\[1, 1000\], got 0"),
        (lambda: SD.timesteps(1001), r"\[1, 1000\], got 1001"),
        (lambda: SD.timesteps(10, "karras"), "leading, trailing, linspace, got 'karras'"),
        (lambda: NoiseSchedule(SD.alpha_bar.float()), "float64"),
        (lambda: NoiseSchedule(SD.alpha_bar.view(10, 100)), r"\(T,\)"),
        (lambda: NoiseSchedule(SD.alpha_bar.flip(0)), "fall strictly"),
        (lambda: NoiseSchedule(torch.tensor([1.0, 0.5]).double()), "fall strictly"),
        (lambda: NoiseSchedule.linear(end=1.5), "fall strictly"),
        (lambda: NoiseSchedule.linear(T=1).zero_terminal_snr(), "fall strictly"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
