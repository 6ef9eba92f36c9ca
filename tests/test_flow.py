"""Flow matching: the reference's scheduler step by step, the density of its times, exact answers, and its complaints."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from minildm.flow import FlowPath, flow_euler


def bent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some model that depends on everything."""
    return torch.sin(3 * x) - x.flip(-1) * t[:, None, None, None] / 700 + 0.2


# ---- against the reference


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_the_sampler_is_the_references_step_by_step(shift, steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as the published pipelines of Flux ask for them
    x = expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    flow_euler(bent, x, FlowPath(shift=shift), steps=steps, callback=lambda *step: seen.append(step))
    assert len(seen) == steps
    for (i, t, now, _), their_t in zip(seen, theirs.timesteps, strict=True):
        assert t == pytest.approx(their_t.item(), rel=1e-6)
        expected = theirs.step(bent(expected, their_t.expand(2)), their_t, expected).prev_sample
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"step {i}: {m}")


def test_left_to_itself_the_reference_stops_just_short_of_the_picture_and_walks_the_rest_in_a_last_step():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(4)
    assert theirs.sigmas.tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0])  # its smallest sigma, then 0
    assert FlowPath().times(4) == [1000, 750, 500, 250]


def test_adding_noise_is_the_references():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = theirs.timesteps[[0, 400, 999]]
    torch.testing.assert_close(FlowPath().add_noise(x0, noise, t), theirs.scale_noise(x0, t, noise), rtol=1e-5, atol=1e-6)


def test_times_are_drawn_as_the_reference_draws_them():
    g, h = (torch.Generator().manual_seed(5) for _ in range(2))
    theirs = compute_density_for_timestep_sampling("logit_normal", 1000, logit_mean=0.4, logit_std=1.3, generator=g)
    torch.testing.assert_close(FlowPath(mean=0.4, std=1.3).draw(1000, h), 1000 * theirs)


@pytest.mark.parametrize(("shift", "mean", "std"), [(1.0, 0.0, 1.0), (3.0, 0.0, 1.0), (1.0, -0.5, 0.6)])
def test_times_have_the_density_of_the_paper(shift, mean, std):
    n = 20_000
    s = FlowPath(shift=shift, mean=mean, std=std).draw(n, torch.Generator().manual_seed(0)).double().sort().values / 1000
    before = s / (shift - (shift - 1) * s)  # the shift undone
    expected = torch.special.ndtr((before.logit() - mean) / std)
    assert (expected - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / n**0.5  # Kolmogorov, 1 in 100


# ---- exact answers


def test_to_a_single_point_one_step_is_enough():
    point = torch.tensor([0.3, -2.0, 1.0, 5.0]).view(1, 4, 1, 1)
    x = torch.randn(5, 4, 1, 1)
    z = flow_euler(lambda x, t: (x - point) / (t.view(-1, 1, 1, 1) / 1000), x, FlowPath(), steps=1)
    torch.testing.assert_close(z, point.expand(5, 4, 1, 1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_to_a_gaussian_the_error_falls_with_the_steps(shift):
    spread, x = 0.4, torch.randn(500, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x, t):
        s = t.double().view(-1, 1, 1, 1) / 1000
        return (s - (1 - s) * spread**2) / ((1 - s) ** 2 * spread**2 + s**2) * x  # E[noise - x0 | x]

    errors = [(flow_euler(model, x, FlowPath(shift=shift), steps=n) - spread * x).abs().max().item() for n in (25, 50, 400)]
    assert 0.4 < errors[1] / errors[0] < 0.6  # first order
    assert errors[2] < 0.02


def test_speed_noise_and_picture_belong_together():
    path, x0, noise = FlowPath(), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([0.0, 333.3, 1000.0])
    x, speed = path.add_noise(x0, noise, t), path.target(x0, noise, t)
    torch.testing.assert_close(path.to_x0(speed, x, t), x0)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(path.add_noise(x0, noise, 500.0), (x0 + noise) / 2)


def test_times_are_shifted_towards_noise_and_end_at_one_to_the_bit():
    assert FlowPath(shift=3.0).times(4) == pytest.approx([1000, 900, 750, 500])
    for shift in torch.linspace(0.05, 7, 300).tolist():  # some of these overshot once, and were then refused
        assert FlowPath(shift=shift).times(7)[0] == 1000
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    assert (FlowPath(shift=3.0).draw(50, g) > FlowPath().draw(50, h)).all()


def test_what_comes_back_is_of_the_kind_that_went_in():
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    assert flow_euler(lambda x, t: torch.zeros_like(x, dtype=torch.float32), x, FlowPath(), steps=2).dtype == torch.float64
    assert x.grad_fn is None


# ---- complaints


@pytest.mark.parametrize("fields", [{"shift": 0.0}, {"std": -1.0}, {"shift": float("nan")}])
def test_a_path_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match="both must be above 0"):
        FlowPath(**fields)


def test_bad_calls_are_named():
    path, x = FlowPath(), torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1000\], got values from 0 to 1001"):
        path.add_noise(x, x, torch.tensor([0.0, 1001.0]))
    with pytest.raises(ValueError, match="one shape"):
        path.add_noise(x, x[:1], 3.0)
    with pytest.raises(ValueError, match="one for each of the 2 samples"):
        path.add_noise(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="\"flow\", the speed, not 'epsilon'"):
        path.target(x, x, 3.0, "epsilon")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        flow_euler(bent, x, path, steps=0)
    with pytest.raises(ValueError, match="shape of its input"):
        flow_euler(lambda x, t: x[:, :2], x, path, steps=1)
    with pytest.raises(FloatingPointError, match="step 0, time 1000"):
        flow_euler(lambda x, t: x / 0, x, path, steps=2)
