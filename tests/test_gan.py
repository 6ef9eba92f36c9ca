"""The discriminator is CompVis's, the losses are the hinge's, and the adaptive weight balances two gradients."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from minildm.gan import PatchDiscriminator, adaptive_weight, generator_loss, hinge_discriminator_loss
from minildm.shapes import Shapes
from minildm.vae import AutoencoderKL, VAEConfig

PUBLISHED = {  # layer: output channels over width, stride, norm after it; written down from the published class, three layers
    "main.0": (1, 2, None),
    "main.2": (2, 2, "main.3"),
    "main.5": (4, 2, "main.6"),
    "main.8": (8, 1, "main.9"),
    "main.11": (None, 1, None),
}


def published(weights: dict, x: torch.Tensor, training: bool) -> torch.Tensor:
    """The published forward pass from its weights by name, in functions of torch alone."""
    for layer, (_, stride, norm) in PUBLISHED.items():
        x = F.conv2d(x, weights[f"{layer}.weight"], weights.get(f"{layer}.bias"), stride=stride, padding=1)
        if norm:
            mean, var = weights[f"{norm}.running_mean"].clone(), weights[f"{norm}.running_var"].clone()
            x = F.batch_norm(x, mean, var, weights[f"{norm}.weight"], weights[f"{norm}.bias"], training=training, eps=1e-5)
        x = F.leaky_relu(x, 0.2) if layer != "main.11" else x
    return x


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape) + 0.5 if name.endswith("var") else torch.randn(t.shape) * 0.1)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_published_discriminator(training):
    d = randomised(PatchDiscriminator(width=8)).train(training)
    x = torch.rand(2, 3, 40, 32) * 2 - 1
    expected = published({n: t.clone() for n, t in d.state_dict().items()}, x, training)
    assert expected.shape == (2, 1, 3, 2)
    torch.testing.assert_close(d(x), expected, atol=1e-6, rtol=1e-6)
    assert expected.std() > 1e-3


def test_names_and_shapes_are_the_published_ones():
    shapes = {n: tuple(t.shape) for n, t in PatchDiscriminator().state_dict().items()}
    expected, channels = {}, 3
    for layer, (times, _, norm) in PUBLISHED.items():
        out = 64 * times if times else 1
        expected[f"{layer}.weight"] = (out, channels, 4, 4)
        if norm:
            expected |= {f"{norm}.{n}": (out,) for n in ("weight", "bias", "running_mean", "running_var")}
            expected[f"{norm}.num_batches_tracked"] = ()
        else:
            expected[f"{layer}.bias"] = (out,)
        channels = out
    assert shapes == expected
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_765_633


def test_it_starts_small():
    d = PatchDiscriminator()
    assert d.main[5].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert d.main[5].weight.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert d.main[9].weight.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert d.main[9].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert (d.main[9].bias == 0).all()


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_each_verdict_is_on_a_patch_of_the_width_it_says(layers, patch):
    d = randomised(PatchDiscriminator(width=4, layers=layers)).double().eval()
    x = torch.rand(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = d(x)
    assert logits.shape[2:] == (128 // 2**layers - 2,) * 2
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == patch


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor(0.5 * (2.5 / 3 + 3.0 / 3)))
    zero = torch.zeros(4)
    assert hinge_discriminator_loss(zero, zero) == 1
    assert hinge_discriminator_loss(zero + 1, zero - 1) == 0


def test_beyond_the_margin_there_is_nothing_to_gain():
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-2.0, -0.5], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_the_decoder_wants_higher_verdicts_everywhere():
    fake = torch.tensor([-2.0, 3.0], requires_grad=True)
    loss = generator_loss(fake)
    loss.backward()
    assert loss == -0.5
    assert fake.grad.tolist() == [-0.5, -0.5]


def test_adaptive_weight_by_hand():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    recon, gan = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 0.5])).sum()  # gradients of length 5 and 0.5
    weight = adaptive_weight(recon, gan, w)
    torch.testing.assert_close(weight, torch.tensor(5 / (0.5 + 1e-4)))
    assert weight.item() == pytest.approx(9.998, abs=5e-4)  # with 1e-6 it would be 9.99998
    assert not weight.requires_grad
    assert w.grad is None  # it leaves nothing behind
    (recon + weight * gan).backward()  # and the graph whole
    torch.testing.assert_close(w.grad, torch.tensor([3.0, 4.0 + 5 * 0.5 / (0.5 + 1e-4)]))


def test_adaptive_weight_is_cut_off_where_the_discriminator_says_nothing():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert adaptive_weight(w.sum(), (0 * w).sum(), w) == 1e4
    assert adaptive_weight(w.sum(), (0 * w).sum(), w, max=7.0) == 7.0
    assert adaptive_weight((0 * w).sum(), w.sum(), w) == 0


def test_adaptive_weight_balances_a_real_decoder():
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), blocks=1, groups=4, mid_attention=False))
    d, x = PatchDiscriminator(width=8, layers=1), Shapes(seed=1).draw(range(4)).images
    recon, _ = vae(x)
    last = vae.decoder.conv_out.weight
    losses = (x - recon).square().mean(), generator_loss(d(recon))
    weight = adaptive_weight(*losses, last)
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(weight * (pulls[1] + 1e-4), pulls[0])
    assert 0 < weight < 1e4


def test_it_learns_to_see_blur():
    d = PatchDiscriminator(width=16, layers=2)
    optimizer = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.9))
    shapes, losses = Shapes(seed=2), []
    for step in range(60):
        real = shapes.draw(range(16 * step, 16 * step + 16)).images
        loss = hinge_discriminator_loss(d(real), d(gaussian_blur(real, [5, 5], [1.0, 1.0])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    d.eval()
    real = shapes.draw(range(5000, 5064)).images
    verdicts = [d(p).mean(dim=(1, 2, 3)) for p in (real, gaussian_blur(real, [5, 5], [1.0, 1.0]))]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (verdicts[0] > verdicts[1]).float().mean() > 0.9


def test_errors_say_what_was_given():
    d = PatchDiscriminator()
    assert d(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    for shape in ((1, 3, 23, 64), (1, 4, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=rf"24 pixels or more, and was given \({', '.join(map(str, shape))}\)"):
            d(torch.zeros(*shape))
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="recon_loss and last_layer must both carry gradients"):
        adaptive_weight(w.sum().detach(), w.sum(), w)
    with pytest.raises(ValueError, match=r"gan_loss does not depend on last_layer \(2,\)"):
        adaptive_weight(w.sum(), torch.ones(1, requires_grad=True).sum(), w)
