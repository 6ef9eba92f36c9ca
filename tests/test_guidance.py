"""Classifier-free guidance, against its formula and against the reference's rescaling."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch.testing import assert_close

from minildm.guidance import guided


class Model:
    """A small nonlinear model that mixes everything it is given, and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context, pooled=None):
        self.calls.append((x, t, context, pooled))
        bias = context.mean(dim=(1, 2)) + (0 if pooled is None else pooled.mean(dim=1))
        return torch.tanh(x * (1 + t.view(-1, 1, 1, 1) / 1000) + bias.view(-1, 1, 1, 1) * x**2) + bias.view(-1, 1, 1, 1)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, T = randn(3, 4, 5, 5), torch.tensor([10, 500, 900])
COND, UNCOND = randn(3, 6, 8, seed=1), randn(3, 6, 8, seed=2)


def formula(scale, cond=COND, uncond=UNCOND):
    without, given = Model()(X, T, uncond), Model()(X, T, cond)
    return without + scale * (given - without), given


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_is_the_formula_in_one_call(scale):
    model = Model()
    assert_close(guided(model, COND, UNCOND, scale=scale)(X, T), formula(scale)[0], rtol=0, atol=1e-14)
    [(x, t, context, pooled)] = model.calls
    assert (len(x), len(t), len(context), pooled) == (6, 6, 6, None)


def test_scale_zero_is_unconditional():
    assert_close(guided(Model(), COND, UNCOND, scale=0)(X, T), Model()(X, T, UNCOND), rtol=0, atol=0)


def test_scale_one_is_conditional_exactly_and_at_half_the_cost():
    model = Model()
    prediction = guided(model, COND, UNCOND, scale=1.0, rescale=0.7)(X, T)
    assert [len(call[0]) for call in model.calls] == [3]
    assert_close(prediction, Model()(X, T, COND), rtol=0, atol=0)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_matches_reference(rescale):
    prediction, given = formula(7.5)
    ours = guided(Model(), COND, UNCOND, scale=7.5, rescale=rescale)(X, T)
    assert_close(ours, rescale_noise_cfg(prediction, given, rescale), rtol=0, atol=4e-15)


def test_rescale_one_restores_the_spread():
    ours = guided(Model(), COND, UNCOND, scale=7.5, rescale=1.0)(X, T)
    assert_close(ours.std(dim=(1, 2, 3)), Model()(X, T, COND).std(dim=(1, 2, 3)))
    assert (formula(7.5)[0].std(dim=(1, 2, 3)) - ours.std(dim=(1, 2, 3))).abs().max() > 0.1


def test_one_condition_serves_the_batch():
    ours = guided(Model(), COND[:1], UNCOND[1:2], scale=4.0)(X, T)
    expected = formula(4.0, COND[:1].expand(3, -1, -1), UNCOND[1:2].expand(3, -1, -1))[0]
    assert_close(ours, expected, rtol=0, atol=1e-14)
    ours = guided(Model(), COND, UNCOND[1:2], scale=4.0)(X, T)  # a prompt each, one negative prompt
    assert_close(ours, formula(4.0, COND, UNCOND[1:2].expand(3, -1, -1))[0], rtol=0, atol=1e-14)


def test_mapping_reaches_the_model_by_keyword():
    pooled, pooled_not = randn(3, 7, seed=3), randn(3, 7, seed=4)
    cond, uncond = {"context": COND, "pooled": pooled}, {"context": UNCOND, "pooled": pooled_not}
    without, given = Model()(X, T, UNCOND, pooled_not), Model()(X, T, COND, pooled)
    assert_close(guided(Model(), cond, uncond, scale=2.0)(X, T), without + 2 * (given - without), rtol=0, atol=1e-14)
    assert_close(guided(Model(), cond, uncond, scale=1)(X, T), given, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guided(Model(), COND, UNCOND, rescale=-0.1), r"\[0, 1\], got -0.1"),
        (lambda: guided(Model(), COND, UNCOND, rescale=1.1), r"\[0, 1\], got 1.1"),
        (lambda: guided(Model(), COND, UNCOND[:, :4]), r"'context'.*\(3, 6, 8\) and \(3, 4, 8\)"),
        (
            lambda: guided(Model(), {"context": COND, "pooled": COND[:, 0]}, UNCOND),
            r"\['context', 'pooled'\] and \['context'\]",
        ),
        (lambda: guided(Model(), COND[:2], UNCOND)(X, T), "batch of 1 or 3, as x has, got 2"),
        (lambda: guided(Model(), COND, UNCOND[:2])(X, T), "batch of 1 or 3, as x has, got 2"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
