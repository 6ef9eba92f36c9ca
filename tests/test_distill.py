"""Distillation: its two formulas against ddim, and a student that can be exact."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minildm.distill import ddim_step, distill, velocity_between
from minildm.samplers import ddim
from minildm.schedule import NoiseSchedule
from minildm.train import Fit, Latents

SCHEDULE = NoiseSchedule.scaled_linear().zero_terminal_snr()
TRAILING = {"prediction_type": "v_prediction", "spacing": "trailing"}


class Toy(nn.Module):
    """A network that can hold any answer that is linear in x and in the caption, at every time its own."""

    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.gain, self.pull = (nn.Parameter(0.5 * torch.randn(1000, generator=g)) for _ in range(2))
        self.cfg = SimpleNamespace(pooled_dim=None)

    def forward(self, x, t, context):
        gain, pull = self.gain[t].view(-1, 1, 1, 1), self.pull[t].view(-1, 1, 1, 1)
        return gain * x + pull * context[:, 0, 0].view(-1, 1, 1, 1)


class Text(nn.Module):
    def forward(self, ids):
        return ids.float()[:, :, None], ids.float()


def parts(n: int = 64) -> dict:
    mean = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(9))
    latents = Latents(mean, torch.zeros_like(mean), ["a"] * n, 1.0)
    return {"text": Text(), "schedule": SCHEDULE, "latents": latents, "ids": (torch.arange(n) % 3)[:, None] + 1}


def test_a_step_is_one_of_ddims():
    toy, x = Toy(0), torch.randn(3, 1, 2, 2)
    told = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)

    def model(x, t):
        return toy(x, t, told)

    seen = []
    ddim(model, x, SCHEDULE, steps=4, callback=lambda i, t, now, x0: seen.append((t, now)), **TRAILING)
    for (t, now), t_next in zip(seen, [749, 499, 249, 0], strict=True):
        x = ddim_step(model, x, SCHEDULE, torch.full((3,), t), torch.full((3,), t_next))
        torch.testing.assert_close(x, now)
    t, t_next = torch.tensor([999, 500, 3]), torch.tensor([400, 0, 2])  # each sample at a time of its own
    mixed = ddim_step(model, x, SCHEDULE, t, t_next)
    for k in range(3):
        alone = ddim_step(lambda x, t, k=k: toy(x, t, told[k : k + 1]), x[k : k + 1], SCHEDULE, t[k : k + 1], t_next[k : k + 1])
        torch.testing.assert_close(mixed[k : k + 1], alone)


def test_the_velocity_between_two_points_leads_from_one_to_the_other():
    x, x_end = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    t, t_end = torch.tensor([999, 999, 500, 1]), torch.tensor([0, 998, 20, 0])
    v = velocity_between(x, x_end, SCHEDULE, t, t_end)
    torch.testing.assert_close(ddim_step(lambda x, t: v, x, SCHEDULE, t, t_end), x_end)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_student_that_can_be_exact_ends_where_the_guided_teacher_ends_in_twice_the_steps(scale):
    teacher, student, given = Toy(0), Toy(1), parts()
    before = [p.clone() for p in teacher.parameters()]
    cfg = Fit(steps=500, lr=0.1, batch_size=48, warmup=10, ema=0.9, weight_decay=0.0)
    extra = {"empty": torch.zeros(1, 1, dtype=torch.int64), "guidance_scale": scale} if scale != 1 else {}
    losses = [p.loss for p in distill(student, teacher, cfg=cfg, steps=2, **given, **extra)]
    assert losses[-1] < 1e-4 < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    x, context = torch.randn(5, 1, 2, 2), torch.full((5, 1, 1), 2.0)

    def asked(net, scale):
        return lambda x, t: net(x, t, 0 * context) + scale * (net(x, t, context) - net(x, t, 0 * context))

    expected = ddim(asked(teacher, scale), x, SCHEDULE, steps=4, **TRAILING)
    torch.testing.assert_close(ddim(asked(student, 1.0), x, SCHEDULE, steps=2, **TRAILING), expected, rtol=0.02, atol=0.02)
    assert (ddim(asked(teacher, scale), x, SCHEDULE, steps=2, **TRAILING) - expected).abs().max() > 0.1


def test_the_students_times_are_every_other_one_of_the_teachers():
    for steps in (1, 2, 4, 8, 10, 16, 25, 32, 500):
        assert SCHEDULE.timesteps(2 * steps, "trailing")[::2] == SCHEDULE.timesteps(steps, "trailing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps must lie in \[1, 500\], half of the teacher's, got 0"),
        ({"steps": 501}, "got 501"),
        ({"guidance_scale": 3.0}, "needs the empty caption"),
        ({"student": None}, "one network; begin the student as a copy"),
    ],
)
def test_bad_calls_are_named(changes, message):
    teacher = Toy(0)
    given = parts() | {"student": Toy(1), "steps": 2} | changes
    given["student"] = given["student"] or teacher
    with pytest.raises(ValueError, match=message):
        next(distill(teacher=teacher, cfg=Fit(steps=1, lr=0.1), **given))


def test_times_the_wrong_way_round_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="0 <= t_end < t < 1000"):
        velocity_between(x, x, SCHEDULE, torch.tensor([5]), torch.tensor([5]))
    with pytest.raises(ValueError, match="one shape"):
        velocity_between(x, x[..., :1], SCHEDULE, torch.tensor([5]), torch.tensor([4]))
