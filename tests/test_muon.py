"""Muon: a step that is as long in every direction, and a state that a checkpoint brings back."""

import pytest
import torch
from torch import nn

from minildm.muon import Muon, orthogonalize
from minildm.train import Fit, fit, step_generator, watch


@pytest.mark.parametrize("shape", [(5, 3, 3), (2, 8, 20), (1, 40, 12)])
def test_all_singular_values_come_near_one_and_the_vectors_stay(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    within = u.mT @ orthogonalize(g) @ vh.mT  # (..., K, K): diagonal, if the vectors stay
    values = within.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3  # the smallest of a random square matrix need not have arrived
    assert values.max() < 1.25
    torch.testing.assert_close(within, torch.diag_embed(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (8, 6, 3, 3), (60, 4, 3, 3)])
def test_it_takes_the_steps_of_torchs_own(shape):
    """Torch's knows matrices alone, and multiplies in bfloat16, whose rounding the tolerance is for.

    Filters are matrices too, one row for each output channel, wherever they lie in memory.
    """
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    filters = len(shape) == 4
    ours = nn.Parameter(start.clone(memory_format=torch.channels_last if filters else torch.contiguous_format))
    theirs = nn.Parameter(start.flatten(1).clone())
    mine = Muon({"weight": ours}, 0.02, lr=1e-3, momentum=0.9, weight_decay=0.5)
    torchs = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.0, nesterov=True)
    for step in range(4):
        grad = torch.randn(shape, generator=step_generator(2, step)) + start
        ours.grad = grad.clone(memory_format=torch.preserve_format).contiguous(
            memory_format=torch.channels_last if filters else torch.contiguous_format
        )
        theirs.grad = grad.flatten(1).clone()
        mine.param_groups[0]["lr"] = 1e-3 / (1 + step)  # what scales one scales the other
        torchs.param_groups[0]["lr"] = 0.02 / (1 + step)
        mine.step()
        torchs.step()
    moved = (ours - start).detach()
    assert moved.norm() > 0.1
    assert (ours.flatten(1) - theirs).norm() < 0.02 * moved.norm()


def test_it_leaves_the_rim_and_the_vectors_to_adamw():
    model = nn.ModuleDict({name: nn.Conv2d(4, 4, 3) for name in ("conv_in", "middle", "conv_out")})
    model["token_embedding"] = nn.Embedding(4, 4)
    parameters = dict(model.named_parameters())
    optimizer = Muon(parameters, 0.02, lr=1e-3)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    assert {name for name, p in parameters.items() if "momentum" in optimizer.state[p]} == {"middle.weight"}
    assert all("exp_avg" in optimizer.state[p] for name, p in parameters.items() if name != "middle.weight")


def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4))

    def train(steps, folder=None, stop=None):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3)).to(memory_format=torch.channels_last)

        def loss_at(step):
            return model(x + torch.randn(x.shape, generator=step_generator(6, step))).square().mean(), {}

        run = fit(model, loss_at, Fit(steps=steps, lr=1e-3, muon=0.02, decay="linear", warmup=2, save_every=3), folder)
        if stop is None:
            watch(run, "toy", quiet=True)
        else:
            for _ in range(stop):
                next(run)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = train(8)
    train(8, tmp_path, stop=5)
    assert torch.equal(train(8, tmp_path), whole)
    adam = Fit(steps=8, lr=1e-3, warmup=2, save_every=3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
    with pytest.raises(ValueError, match="another decay, muon"):
        next(fit(model, lambda step: (model(x).square().mean(), {}), adam, tmp_path))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"decay": "sudden"}, '"cosine" or "linear"'),
        ({"muon": -0.02}, "neither is below 0"),
        ({"muon": 0.02, "lr": 0.0}, "lr is above it"),
        ({"accumulate": 0}, "at least 1 part"),
    ],
)
def test_a_choice_that_trains_nothing_right_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Fit(**{"steps": 4, "lr": 1e-3, **wrong})
