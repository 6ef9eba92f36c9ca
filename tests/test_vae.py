"""The autoencoder's distribution, its loss term by term, its shapes and its complaints."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from minildm.vae import AutoencoderKL, DiagonalGaussian, VAEConfig, vae_loss


def test_kl_equals_the_library():
    posterior = DiagonalGaussian(torch.randn(5, 8, 3, 3, dtype=torch.float64))
    library = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), library)


def test_samples_have_the_stated_mean_and_deviation():
    posterior = DiagonalGaussian(torch.tensor([0.5, -1.0, -2.0, 0.4]).view(1, 4, 1, 1).expand(1, 4, 100, 100))
    z = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.tensor([0.5, -1.0]), atol=0.04, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.tensor([-1.0, 0.2]).exp(), atol=0.02, rtol=0)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))


def test_extreme_log_variances_stay_finite():
    posterior = DiagonalGaussian(torch.tensor([0.0, 1e6]).view(1, 2, 1, 1))
    assert posterior.std.isfinite().all()
    assert posterior.kl().isfinite().all()


def test_the_tiny_and_the_published_autoencoder_compress_48_times():
    assert 64 * 64 * 3 == 48 * 8 * 8 * 4
    assert 512 * 512 * 3 == 48 * 64 * 64 * 4
    assert VAEConfig.sd15().downsampling == VAEConfig.tiny().downsampling == 8
    vae = AutoencoderKL(VAEConfig.tiny())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    recon, posterior = vae(x, torch.Generator().manual_seed(0))
    assert posterior.mean.shape == (2, 4, 8, 8)
    assert recon.shape == x.shape


def test_each_term_of_the_loss_can_be_left_out():
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), blocks=1, groups=4, mid_attention=False))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    recon, posterior = vae(x)
    mse = (x - recon).square().mean()
    loss, parts = vae_loss(x, recon, posterior, kl_weight=0)
    assert set(parts) == {"recon"}
    torch.testing.assert_close(loss, mse)
    loss, parts = vae_loss(x, recon, posterior, kl_weight=0, recon_norm="l1")
    torch.testing.assert_close(loss, (x - recon).abs().mean())
    loss, parts = vae_loss(
        x, recon, posterior, kl_weight=0.5, perceptual=lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)), perceptual_weight=2.0,
        adversarial=torch.tensor(3.0),
    )  # fmt: skip
    assert set(parts) == {"recon", "kl", "perceptual", "adversarial"}
    by_hand = mse + 0.5 * posterior.kl().mean() / (3 * 16 * 16) + 2 * (x - recon).abs().amax(dim=(1, 2, 3)).mean() + 3
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 60, 64), "multiples of 8"), ((1, 1, 64, 64), "takes pictures"), ((3, 64, 64), "takes pictures")],
)
def test_wrong_pictures_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(VAEConfig.tiny()).encode(torch.zeros(shape))


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match=r"takes latents \(B, 4, h, w\)"):
        AutoencoderKL(VAEConfig.tiny()).decode(torch.zeros(1, 8, 8, 8))


def test_an_unknown_norm_is_refused():
    posterior = DiagonalGaussian(torch.zeros(1, 8, 2, 2))
    with pytest.raises(ValueError, match="l1 or l2"):
        vae_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), posterior, recon_norm="l3")
