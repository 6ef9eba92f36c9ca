"""Every sampler, step by step against the reference scheduler, and against a model whose answer is known."""

import inspect
from itertools import pairwise

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

from minildm.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpmpp_2m, euler, heun, timesteps_of
from minildm.schedule import PREDICTION_TYPES, SPACINGS, NoiseSchedule

# the reference hands tensors to numpy in a way that numpy 2 warns about
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

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
    assert [i for i, *_ in path] == list(range(options["steps"] - options.get("skip", 0)))
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


def theirs(sampler, x, schedule, steps, spacing, prediction_type, skip=0, **step_options):
    """What `ours` returns, as the reference has it."""
    cls, config = REFERENCE[sampler]
    scheduler = reference(cls, schedule, steps, spacing, prediction_type, **config)
    model, xs, x0s = Model(), [], []
    first = skip * scheduler.order
    if skip:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(CLEAN, x, scheduler.timesteps[first : first + 1])
    else:
        x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps[first:], first):
        prediction = model(scheduler.scale_model_input(x, t), t.long().expand(len(x)))
        output = scheduler.step(prediction, t, x, **step_options)
        x = output.prev_sample
        scale = (scheduler.sigmas[i + 1].double() ** 2 + 1) ** 0.5 if sampler in (euler, heun) else 1
        xs.append(x / scale)
        x0s.append(getattr(output, "pred_original_sample", None))
    if sampler is heun:  # two calls a step but for the last
        xs, x0s = xs[1::2] + xs[-1:], x0s[0::2]
    return model.timesteps, xs, x0s


CLEAN = randn(2, 4, 6, 6, seed=5)


def differences(sampler, schedule, steps, spacing, prediction_type, eta=None, skip=0):
    """Largest difference of x and x0 from the reference over all steps, relative to the larger of 1 and what is compared."""
    x = noise_ref = randn(2, 4, 6, 6)
    options = {"steps": steps, "spacing": spacing, "prediction_type": prediction_type} | ({"skip": skip} if skip else {})
    if skip:
        x = schedule.add_noise(CLEAN, x, timesteps_of(sampler, schedule, steps, spacing, skip)[0])
    noise = {"generator": torch.Generator().manual_seed(3)} if sampler in (ddim, ddpm) else {}
    drawn = {"generator": torch.Generator().manual_seed(3)} if sampler in (ddim, ddpm) else {}
    eta = {} if eta is None else {"eta": eta}
    asked, ts, xs, x0s = ours(sampler, x, schedule, **options, **noise, **eta)
    asked_ref, xs_ref, x0s_ref = theirs(sampler, noise_ref, schedule, **options, **drawn, **eta)
    assert asked == asked_ref
    assert ts == list(dict.fromkeys(asked))
    assert len(xs) == len(xs_ref) == steps - skip
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
    # sigma starts at 4096, where float32 is 2e-4 apart
    difference = differences(sampler, ZERO, 20, "trailing", prediction_type)
    assert difference < {ddim: 1e-12, ddpm: 1e-9, euler: 1e-5, heun: 1e-4, dpmpp_2m: 1e-5}[sampler]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("skip", [1, 4, 9])
@pytest.mark.parametrize("sampler", REFERENCE)
def test_starting_half_way_matches_reference(sampler, skip, spacing):
    assert differences(sampler, SD, 10, spacing, "epsilon", skip=skip) < {ddim: 1e-12, ddpm: 1e-9}.get(sampler, 1e-5)
    assert differences(sampler, ZERO, 10, "trailing", "v_prediction", skip=skip) < 1e-5


@pytest.mark.parametrize("sampler", [ddim, euler, heun])  # dpmpp_2m forgets its past, ddpm its noise
def test_skipping_goes_on_where_a_whole_run_was(sampler):
    options = {"steps": 8, "prediction_type": "v_prediction"}
    _, _, xs, _ = ours(sampler, randn(2, 4, 6, 6), SD, **options)
    for skip in (1, 3, 7):
        assert_close(ours(sampler, xs[skip - 1], SD, **options, skip=skip)[2][-1], xs[-1])


def test_what_epsilon_cannot_say_at_pure_noise_does_not_matter_when_that_is_skipped():
    x = randn(1, 4, 4, 4)
    assert ddim(Model(), x, ZERO, steps=5, spacing="trailing", skip=1).isfinite().all()


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_zero_terminal_ddim_with_noise_matches_reference(eta):
    assert differences(ddim, ZERO, 10, "trailing", "v_prediction", eta) < 1e-12


def test_known_timesteps():
    x = randn(1, 4, 4, 4)
    asked = {sampler: ours(sampler, x, SD, steps=50)[0] for sampler in REFERENCE}
    for sampler, timesteps in asked.items():
        assert timesteps_of(sampler, SD, 50) == list(dict.fromkeys(timesteps))
        assert timesteps_of(sampler, SD, 50, skip=20) == list(dict.fromkeys(timesteps))[20:]
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
        from_mean = (x - a.sqrt() * MU) / (a * SPREAD**2 + 1 - a)
        x0, epsilon = MU + a.sqrt() * SPREAD**2 * from_mean, (1 - a).sqrt() * from_mean
        return {"epsilon": epsilon, "sample": x0, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * x0}[prediction_type]

    return model


def exact_path(x, a, a_end):
    """Where the path through x at level a is when the level is a_end."""
    spread, spread_end = (SPREAD**2 * a + 1 - a) ** 0.5, (SPREAD**2 * a_end + 1 - a_end) ** 0.5
    return a_end**0.5 * MU + spread_end / spread * (x - a**0.5 * MU)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_have_the_mean_and_spread_of_the_data(sampler, prediction_type):
    schedule = SD if prediction_type == "epsilon" else ZERO
    options = {"spacing": "trailing", "steps": 100, "prediction_type": prediction_type}
    generator = torch.Generator().manual_seed(1)
    x0 = sampler(gaussian_model(prediction_type, schedule), randn(4, 4, 32, 32), schedule, generator=generator, **options)
    assert abs(x0.mean().item() - MU) < 0.06  # without zero terminal SNR the start should hold 7 % of MU, and does not
    assert abs(x0.std().item() - SPREAD) < 0.04  # ddpm's smaller variance is a little too small


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_halving_the_step_divides_the_error_by_two_or_four(sampler, order):
    def error(steps):
        def model(x, t):
            seen.append(x)
            return gaussian_model()(x, t)

        seen, ts, xs = [], [], []
        options = {"steps": steps, "spacing": "trailing"}
        sampler(model, randn(1, 4, 8, 8), SD, callback=lambda i, t, x, x0: (ts.append(t), xs.append(x)), **options)
        at_519 = xs[ts.index(519) - 1]  # every number of steps below stops there
        return (at_519 - exact_path(seen[0], SD.alpha_bar[999].item(), SD.alpha_bar[519].item())).abs().max().item()

    errors = [error(steps) for steps in (25, 50, 100)]
    assert all(1.8 < (a / b) ** (1 / order) < 2.2 for a, b in pairwise(errors))


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


@pytest.mark.parametrize("spacing", SPACINGS)
def test_inversion_returns_to_its_start(spacing):
    x0, errors = MU + SPREAD * randn(2, 4, 8, 8), []
    for steps in (50, 100):
        noise = ddim_invert(gaussian_model(), x0, SD, steps=steps, spacing=spacing)
        errors.append((ddim(gaussian_model(), noise, SD, steps=steps, spacing=spacing) - x0).abs().max().item())
    assert abs(noise.mean().item()) < 0.1
    assert abs(noise.std().item() - 1) < 0.1
    assert errors[1] < 0.05  # of values between -0.6 and 2
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_one_signature_for_all():
    expected = dict(inspect.signature(ddim).parameters)
    expected.pop("eta")
    for sampler in (ddpm, euler, heun, dpmpp_2m):
        assert dict(inspect.signature(sampler).parameters) == expected
    assert list(SAMPLERS.values()) == [ddim, ddpm, euler, heun, dpmpp_2m]
    assert all(name == sampler.__name__ for name, sampler in SAMPLERS.items())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
class TestEverySampler:
    def test_same_seed_same_latents(self, sampler):
        def run(seed):
            return sampler(Model(), randn(2, 4, 6, 6), SD, steps=5, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(run(1), run(1))
        assert torch.equal(run(1), run(2)) == (sampler is not ddpm)

    def test_an_image_does_not_depend_on_its_batch(self, sampler):
        options = {"steps": 5, "eta": 1.0} if sampler is ddim else {"steps": 5}
        x = randn(3, 4, 6, 6)
        together = sampler(Model(), x, SD, generator=[torch.Generator().manual_seed(s) for s in (7, 8, 9)], **options)
        alone = sampler(Model(), x[1:2], SD, generator=[torch.Generator().manual_seed(8)], **options)
        assert torch.equal(together[1:2], alone)
        assert torch.equal(alone, sampler(Model(), x[1:2], SD, generator=torch.Generator().manual_seed(8), **options))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_dtype_of_x_is_kept(self, sampler, dtype):
        x, seen = randn(1, 4, 4, 4), []
        expected = sampler(gaussian_model("v_prediction"), x, SD, steps=5, prediction_type="v_prediction")

        def model(x, t):
            seen.append(x.dtype)
            return gaussian_model("v_prediction")(x.double(), t)  # a model may answer in another dtype

        x0 = sampler(model, x.to(dtype), SD, steps=5, prediction_type="v_prediction")
        assert {*seen, x0.dtype} == {dtype}
        if sampler is not ddpm:
            assert_close(x0.double(), expected, rtol=0, atol=40 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stands_a_first_sigma_of_4096(self, sampler, dtype, monkeypatch):
        x, model = randn(2, 4, 8, 8), gaussian_model("v_prediction", ZERO)
        monkeypatch.setattr("minildm.samplers._noise_like", lambda x, generator: randn(2, 4, 8, 8).to(x.dtype))
        options = {"steps": 10, "spacing": "trailing", "prediction_type": "v_prediction"}
        expected = sampler(model, x, ZERO, **options)
        error = sampler(lambda x, t: model(x.double(), t), x.to(dtype), ZERO, **options).double() - expected
        most = 24 if sampler is heun else 4  # it multiplies by 273 what the rounding of two slopes leaves between them
        assert error.square().mean().sqrt() < most * torch.finfo(dtype).eps

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    def test_what_the_model_was_shown_and_gave_stays_as_it_was(self, sampler, prediction_type):
        models, callbacks = [], []

        def model(x, t):
            prediction = gaussian_model(prediction_type)(x, t)
            models.extend((kept, kept.clone()) for kept in (x, t, prediction))
            return prediction

        def look(i, t, x, x0):
            assert x is not x0
            callbacks.extend((kept, kept.clone()) for kept in (x, x0))

        x = sampler(model, randn(2, 4, 4, 4), SD, steps=4, prediction_type=prediction_type, callback=look)
        assert all(torch.equal(*pair) for pair in models + callbacks)
        assert all(x is not kept for kept, _ in models)

    def test_no_gradient_and_no_change_to_the_start(self, sampler):
        weight = torch.nn.Parameter(torch.tensor(0.5))
        x = randn(1, 4, 4, 4)
        x0 = sampler(lambda x, t: weight * x, x, SD, steps=3)
        assert not x0.requires_grad
        assert torch.equal(x, randn(1, 4, 4, 4))

    def test_one_step_and_every_step(self, sampler):
        schedule = NoiseSchedule.linear(T=12, end=0.5)
        for steps in (1, 11, 12):
            for spacing in SPACINGS:
                asked = ours(sampler, randn(1, 4, 4, 4), schedule, steps=steps, spacing=spacing)[0]
                assert all(0 <= t < 12 for t in asked)
                assert list(dict.fromkeys(asked)) == sorted(set(asked), reverse=True)

    def test_zero_terminal_snr_needs_another_prediction_than_epsilon(self, sampler):
        with pytest.raises(ValueError, match=r'timestep 999 is pure noise.*"v_prediction"'):
            sampler(Model(), randn(1, 4, 4, 4), ZERO, steps=5, spacing="trailing")
        assert sampler(Model(), randn(1, 4, 4, 4), ZERO, steps=5).isfinite().all()  # "leading" starts lower
        for steps in range(1, 1001):
            if timesteps_of(sampler, ZERO, steps)[0] == 999:  # but not always
                with pytest.raises(ValueError, match="timestep 999 is pure noise"):
                    sampler(Model(), randn(1, 4, 4, 4), ZERO, steps=steps)
        if sampler is dpmpp_2m:  # which begins at 501, where the others begin at 999
            assert dpmpp_2m(Model(), randn(1, 4, 4, 4), ZERO, steps=500).isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize(("spoilt_at", "found_at"), [(0, 0), (3, 4), (6, None)])
    def test_a_spoilt_prediction_is_an_error(self, sampler, bad, spoilt_at, found_at):
        model, timesteps, asked = gaussian_model(), timesteps_of(sampler, SD, 7), []

        def spoilt(x, t):
            asked.append(t[0].item())
            prediction = model(x, t)
            prediction[0, 0, 0, 0] = bad if t[0] == timesteps[spoilt_at] else prediction[0, 0, 0, 0]
            return prediction

        found = "after the last step" if found_at is None else f"at step {found_at}, timestep {timesteps[found_at]}"
        with pytest.raises(FloatingPointError, match=f"NaN or Inf {found}; check"):
            sampler(spoilt, randn(1, 4, 4, 4), SD, steps=7)
        assert asked[-1] == timesteps[-1 if found_at is None else found_at]

    def test_large_numbers_are_not_taken_for_spoilt_ones(self, sampler):
        for dtype, large in ((torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)):
            answer = torch.full((2, 4, 8, 8), large, dtype=dtype)  # in float16 a sum of them is infinite
            sampler(lambda x, t, answer=answer: answer, randn(2, 4, 8, 8, dtype=torch.float32), SD, steps=2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, r"\[1, 1000\], got 0"),
            ({"steps": 1001}, r"\[1, 1000\], got 1001"),
            ({"steps": 5, "skip": 5}, r"skip must lie in \[0, 5\), got 5"),
            ({"steps": 5, "skip": -1}, r"skip must lie in \[0, 5\), got -1"),
            ({"spacing": "karras"}, "leading, trailing, linspace, got 'karras'"),
            ({"prediction_type": "eps"}, "epsilon, v_prediction, sample, got 'eps'"),
            ({"model": lambda x, t: x[:, :2]}, r"\(2, 4, 4, 4\), got \(2, 2, 4, 4\)"),
        ],
    )
    def test_errors_name_what_was_given(self, sampler, options, message):
        with pytest.raises(ValueError, match=message):
            sampler(**{"model": Model(), "x": randn(2, 4, 4, 4), "schedule": SD} | options)


def test_eta_and_generators_are_checked():
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"\[0, 1\], got {eta}"):
            ddim(Model(), randn(2, 4, 4, 4), SD, eta=eta)
    with pytest.raises(ValueError, match="got 1 for a batch of 2"):
        ddpm(Model(), randn(2, 4, 4, 4), SD, steps=2, generator=[torch.Generator()])
