"""Every sampler, step by step against the reference scheduler, and against a model whose answer is known."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch.testing import assert_close

from minildm.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpmpp_2m, euler, heun
from minildm.schedule import PREDICTION_TYPES, SPACINGS, NoiseSchedule

SD = NoiseSchedule.scaled_linear()
ZERO = SD.zero_terminal_snr()

REFERENCE = {
    ddim: (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    ddpm: (DDPMScheduler, {"clip_sample": False}),
    euler: (EulerDiscreteScheduler, {}),
    heun: (HeunDiscreteScheduler, {}),
    dpmpp_2m: (DPMSolverMultistepScheduler, {}),
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Model:
    """A small fixed nonlinear model that mixes neighbours and the timestep, and remembers the timesteps it was asked about."""

    def __init__(self):
        self.timesteps = []

    def __call__(self, x, t):
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        self.timesteps.append(t[0].item())
        w = t.view(-1, 1, 1, 1) / 1000
        return torch.tanh((1 + w) * x + 0.5 * x.roll(1, dims=-1) - 0.3 * x.roll(1, dims=1)) + 0.2 * torch.sin(3 * w + x)


def ours(sampler, x, schedule, **options):
    """The timesteps asked about, and after each step t, x and x0."""
    model, path = Model(), []
    result = sampler(model, x, schedule, callback=lambda i, t, x, x0: path.append((i, t, x, x0)), **options)
    assert [i for i, *_ in path] == list(range(options["steps"]))
    assert_close(result, path[-1][2], rtol=0, atol=0)
    return model.timesteps, [t for _, t, _, _ in path], [x for *_, x, _ in path], [x0 for *_, x0 in path]


def reference(cls, schedule, steps, spacing, prediction_type, **config):
    """A reference scheduler that works with our levels, to the last digit."""
    offset = 1 if spacing == "leading" and steps < schedule.T else 0
    common = {"num_train_timesteps": schedule.T, "timestep_spacing": spacing, "prediction_type": prediction_type}
    scheduler = cls(**common, steps_offset=offset, **config)
    scheduler.alphas_cumprod = schedule.alpha_bar.clone()
    if cls in (EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler) and schedule.alpha_bar[-1] == 0:
        scheduler.alphas_cumprod[-1] = 2**-24  # what rescale_betas_zero_snr does in all but Heun, which lacks it
    scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = schedule.alpha_bar[0]
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def theirs(sampler, x, schedule, steps, spacing, prediction_type, **step_options):
    """What `ours` returns, as the reference has it."""
    cls, config = REFERENCE[sampler]
    scheduler = reference(cls, schedule, steps, spacing, prediction_type, **config)
    model, xs, x0s = Model(), [], []
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        prediction = model(scheduler.scale_model_input(x, t), t.long().expand(len(x)))
        output = scheduler.step(prediction, t, x, **step_options)
        x = output.prev_sample
        scale = (scheduler.sigmas[i + 1].double() ** 2 + 1) ** 0.5 if sampler in (euler, heun) else 1
        xs.append(x / scale)
        x0s.append(getattr(output, "pred_original_sample", None))
    if sampler is heun:  # two calls a step but for the last
        xs, x0s = xs[1::2] + xs[-1:], x0s[0::2]
    return model.timesteps, xs, x0s


def differences(sampler, schedule, steps, spacing, prediction_type, eta=None):
    """Largest difference of x and x0 from the reference over all steps, relative to the larger of 1 and what is compared."""
    x = randn(2, 4, 6, 6)
    options = {"steps": steps, "spacing": spacing, "prediction_type": prediction_type}
    noise = {"generator": torch.Generator().manual_seed(3)} if sampler in (ddim, ddpm) else {}
    noise_ref = {"generator": torch.Generator().manual_seed(3)} if sampler in (ddim, ddpm) else {}
    eta = {} if eta is None else {"eta": eta}
    asked, ts, xs, x0s = ours(sampler, x, schedule, **options, **noise, **eta)
    asked_ref, xs_ref, x0s_ref = theirs(sampler, x, schedule, **options, **noise_ref, **eta)
    assert asked == asked_ref
    assert ts == list(dict.fromkeys(asked))
    assert len(xs) == len(xs_ref) == steps
    pairs = [*zip(xs, xs_ref, strict=True), *((a, b) for a, b in zip(x0s, x0s_ref, strict=True) if b is not None)]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


def in_each_setting(test):
    for name, values in {
        "prediction_type": PREDICTION_TYPES,
        "spacing": ["leading", "trailing"],
        "steps": [10, 20, 50],
    }.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


@in_each_setting
@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_deterministic_samplers_match_reference(sampler, steps, spacing, prediction_type):
    # the reference keeps its sigmas, and euler and dpmpp_2m their x, in float32
    assert differences(sampler, SD, steps, spacing, prediction_type) < 1e-5


@in_each_setting
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_matches_reference(eta, steps, spacing, prediction_type):
    assert differences(ddim, SD, steps, spacing, prediction_type, eta) < 1e-12


@in_each_setting
def test_ddpm_matches_reference(steps, spacing, prediction_type):
    # the reference lends its last step a variance of 1e-20, where the formula says 0
    assert differences(ddpm, SD, steps, spacing, prediction_type) < 1e-9


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_2m])
def test_linspace_matches_reference(sampler):
    # not ddim, whose reference steps to t - T // steps wherever the next timestep is; nor euler and heun, whose timesteps are
    # then fractions
    assert differences(sampler, SD, 20, "linspace", "epsilon") < 1e-5


def test_ddpm_over_all_timesteps_matches_reference():
    schedule = NoiseSchedule.linear(T=60, start=1e-3, end=0.2)
    assert differences(ddpm, schedule, 60, "leading", "epsilon") < 1e-9
    assert ours(ddpm, randn(1, 4, 6, 6), schedule, steps=60)[0] == list(range(60))[::-1]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [ddim, ddpm, euler, heun, dpmpp_2m])
def test_zero_terminal_snr_matches_reference(sampler, prediction_type):
    # from sigma = 4096 the reference's float32 leaves euler 6e-5, and heun, which has x in float64, 1e-7 times that
    tolerance = {ddim: 1e-12, ddpm: 1e-9, euler: 1e-3, heun: 1e-3, dpmpp_2m: 1e-5}[sampler]
    difference = differences(sampler, ZERO, 20, "trailing", prediction_type)
    print(sampler.__name__, prediction_type, difference)
    assert difference < tolerance


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_zero_terminal_ddim_with_noise_matches_reference(eta):
    assert differences(ddim, ZERO, 10, "trailing", "v_prediction", eta) < 1e-12


def test_known_timesteps():
    x = randn(1, 4, 4, 4)
    asked = {sampler: ours(sampler, x, SD, steps=50)[0] for sampler in REFERENCE}
    assert (asked[ddim][0], asked[ddim][-1], len(asked[ddim])) == (981, 1, 50)
    assert asked[ddpm] == asked[euler] == asked[ddim]
    assert len(asked[heun]) == 99
    assert (asked[dpmpp_2m][0], asked[dpmpp_2m][-1], len(asked[dpmpp_2m])) == (951, 20, 50)


# Where every pixel of the data is normal with mean MU and deviation SPREAD, the best prediction is known, and so is the exact
# path that the deterministic samplers approximate.
MU, SPREAD = 0.8, 0.4


def gaussian_model(prediction_type="epsilon", schedule=SD):
    def model(x, t):
        a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        epsilon = (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * SPREAD**2 + 1 - a)
        if prediction_type == "epsilon":
            return epsilon
        x0 = MU + a.sqrt() * SPREAD**2 * (x - a.sqrt() * MU) / (a * SPREAD**2 + 1 - a)
        return x0 if prediction_type == "sample" else a.sqrt() * epsilon - (1 - a).sqrt() * x0

    return model


def exact_end(x, a):
    """Where the path through x at level a ends, at a level of 1."""
    return MU + SPREAD * (x - a**0.5 * MU) / (a * SPREAD**2 + 1 - a) ** 0.5


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_have_the_data_s_mean_and_spread(sampler, prediction_type):
    x = randn(4, 4, 32, 32)
    schedule = SD if prediction_type == "epsilon" else ZERO
    options = {"spacing": "trailing", "steps": 100, "prediction_type": prediction_type}
    model = gaussian_model(prediction_type, schedule)
    x0 = sampler(model, x, schedule, generator=torch.Generator().manual_seed(1), **options)
    assert abs(x0.mean().item() - MU) < 0.06  # the schedule that is not rescaled keeps 7 % of a mean that the noise lacks
    assert abs(x0.std().item() - SPREAD) < 0.02


def test_second_order_beats_first_order():
    x = randn(1, 4, 8, 8)

    def error(sampler, steps):
        timesteps = []
        model = gaussian_model()
        x0 = sampler(lambda x, t: timesteps.append(t[0].item()) or model(x, t), x, SD, steps=steps)
        return (x0 - exact_end(x, SD.alpha_bar[timesteps[0]])).abs().max().item()

    for sampler in (ddim, euler, heun, dpmpp_2m):
        print(sampler.__name__, [error(sampler, n) for n in (20, 40, 80)])
    assert 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 50])
def test_inversion_matches_reference(steps, spacing, prediction_type):
    config = {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = reference(DDIMInverseScheduler, SD, steps, spacing, prediction_type, **config)
    x, model = randn(2, 4, 6, 6), Model()
    inverted = ddim_invert(model, x, SD, steps=steps, spacing=spacing, prediction_type=prediction_type)
    assert model.timesteps == SD.timesteps(steps, spacing)[::-1]
    for t in scheduler.timesteps:
        x = scheduler.step(Model()(x, t.expand(len(x))), t.item(), x).prev_sample
    assert_close(inverted, x, rtol=1e-12, atol=1e-12)


def test_inversion_returns_to_its_start():
    x0 = MU + SPREAD * randn(2, 4, 8, 8)
    for spacing in SPACINGS:
        errors = []
        for steps in (25, 50, 100):
            noise = ddim_invert(gaussian_model(), x0, SD, steps=steps, spacing=spacing)
            errors.append((ddim(gaussian_model(), noise, SD, steps=steps, spacing=spacing) - x0).abs().max().item())
            print(noise.std(), noise.mean())
        print(spacing, errors)
    assert 0
