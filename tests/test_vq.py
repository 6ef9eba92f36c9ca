"""The quantiser rounds to the nearest code, lets the gradient through, and keeps its codes alive."""

import math

import pytest
import torch
import torch.nn.functional as F

from minildm.shapes import Shapes
from minildm.train import Fit, fit, step_generator
from minildm.vae import AutoencoderKL, VAEConfig
from minildm.vq import VectorQuantizer, VQAutoencoder


def random_quantizer(codes=7, dim=3, **options):
    """One with codes as far apart as latents are, in a state that no training step has touched."""
    quantizer = VectorQuantizer(codes, dim, revive_below=0, **options)
    quantizer.codebook.data.normal_()
    quantizer.sums.copy_(quantizer.codebook)
    return quantizer


def rows(z):
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def test_each_vector_goes_to_its_nearest_code():
    quantizer = random_quantizer(codes=50).eval()
    z = torch.randn(2, 3, 4, 5)
    got = quantizer(z)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                distances = [(z[b, :, i, j] - code).square().sum().item() for code in quantizer.codebook]
                nearest = min(range(50), key=distances.__getitem__)
                assert got.codes[b, i, j] == nearest
                assert torch.equal(got.z[b, :, i, j], quantizer.codebook[nearest])


def test_codes_close_together_and_far_from_zero_are_told_apart():
    quantizer = random_quantizer(codes=40, dim=4).eval()
    quantizer.codebook.data.mul_(1e-2).add_(100)
    vectors = quantizer.codebook.detach() + 1e-4
    assert quantizer.nearest(vectors).tolist() == list(range(40))


@pytest.mark.parametrize("ema", [True, False])
def test_the_gradient_passes_straight_through(ema):
    quantizer = random_quantizer(ema=ema).eval()
    z, upstream = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    got = quantizer(z)
    (gradient,) = torch.autograd.grad(got.z, z, upstream)
    assert torch.equal(gradient, upstream)  # the identity, though the value moved
    assert (got.z - z).abs().max() > 0.1
    if not ema:
        assert torch.autograd.grad(quantizer(z).z.sum(), quantizer.codebook, allow_unused=True) == (None,)


def test_the_commitment_pulls_the_encoder_to_its_code():
    quantizer = random_quantizer(beta=0.4).eval()
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    got = quantizer(z)
    torch.testing.assert_close(got.loss, 0.4 * (z - got.z.detach()).square().mean())
    (gradient,) = torch.autograd.grad(got.loss, z)
    torch.testing.assert_close(gradient, 0.4 * 2 * (z - got.z).detach() / z.numel())
    assert not quantizer.codebook.requires_grad


def test_the_codebook_loss_pulls_each_code_to_its_vectors():
    quantizer = random_quantizer(beta=0.25, ema=False).eval()
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    got = quantizer(z)
    torch.testing.assert_close(got.loss, 1.25 * (z - got.z.detach()).square().mean())
    to_z, to_codes = torch.autograd.grad(got.loss, (z, quantizer.codebook))
    torch.testing.assert_close(to_z, 0.25 * 2 * (z - got.z).detach() / z.numel())  # beta is on the encoder's side
    by_hand = torch.zeros_like(quantizer.codebook)
    for vector, k in zip(rows(z.detach()), got.codes.flatten(), strict=True):
        by_hand[k] += 2 * (quantizer.codebook[k].detach() - vector) / z.numel()
    torch.testing.assert_close(to_codes, by_hand)


def test_running_means_by_hand():
    quantizer = random_quantizer(codes=5, dim=3, decay=0.9)
    codebook = quantizer.codebook.detach().clone()
    counts, sums = torch.ones(5), codebook.clone()
    for _ in range(4):
        z = torch.randn(2, 3, 3, 3)
        vectors, counted, summed = rows(z), torch.zeros(5), torch.zeros(5, 3)
        for vector in vectors:
            k = (codebook - vector).norm(dim=1).argmin()
            counted[k] += 1
            summed[k] += vector
        counts, sums = 0.9 * counts + 0.1 * counted, 0.9 * sums + 0.1 * summed
        smoothed = (counts + 1e-5) / (counts.sum() + 5e-5) * counts.sum()
        codebook = sums / smoothed[:, None]
        quantizer(z)
        torch.testing.assert_close(quantizer.counts, counts)
        torch.testing.assert_close(quantizer.sums, sums)
        torch.testing.assert_close(quantizer.codebook.detach(), codebook)


def test_a_code_that_nobody_chooses_stays_where_it_is():
    quantizer = random_quantizer(codes=3, dim=2)
    quantizer.codebook.data[2] = 50.0
    quantizer.sums.copy_(quantizer.codebook)
    for _ in range(20):
        quantizer(torch.randn(4, 2, 4, 4))
    torch.testing.assert_close(quantizer.codebook[2].detach(), torch.full((2,), 50.0), rtol=1e-3, atol=0)


def test_codes_settle_on_the_clusters_of_their_vectors():
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    quantizer, generator = VectorQuantizer(12, 2, decay=0.9), torch.Generator().manual_seed(3)
    for _ in range(100):
        picks = torch.randint(3, (2, 8, 8), generator=generator)
        z = centres[picks].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 2, 8, 8, generator=generator)
        quantizer(z, generator)
    distances = torch.cdist(centres, quantizer.codebook)
    assert distances.min(dim=1).values.max() < 0.15  # every cluster has a code
    assert distances.min(dim=0).values.max() < 0.3  # and every code a cluster


def test_evaluation_changes_nothing():
    quantizer = VectorQuantizer(6, 3).eval()
    before = {n: t.clone() for n, t in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(before[n], t) for n, t in quantizer.state_dict().items())


def test_every_code_begins_at_a_vector_of_the_first_batch():
    quantizer, z = VectorQuantizer(12, 3, ema=False), torch.randn(2, 3, 4, 4)
    got = quantizer(z, torch.Generator().manual_seed(0))
    distances = (quantizer.codebook.detach()[:, None] - rows(z)).norm(dim=2)  # (12, 32)
    assert (distances.min(dim=1).values == 0).all()
    assert len(distances.argmin(dim=1).unique()) == 12  # twelve different ones
    assert len(got.codes.unique()) == 12


def test_the_dead_are_revived_and_the_living_left_alone():
    quantizer = VectorQuantizer(4, 2, decay=0.5, revive_below=0.2)
    z = torch.randn(2, 2, 4, 4)
    quantizer(z, torch.Generator().manual_seed(0))
    with torch.no_grad():
        quantizer.codebook[1] = 1000.0
        quantizer.sums[1] = 1000.0 * quantizer.counts[1]
    generator, chosen = torch.Generator().manual_seed(1), []
    for _ in range(6):
        chosen.append((quantizer(z, generator).codes == 1).sum().item())
    assert chosen[0] == 0
    assert chosen[-1] > 0
    vectors, before = rows(torch.randn(2, 2, 4, 4)), quantizer.codebook.detach().clone()
    quantizer.counts.copy_(torch.tensor([5.0, 1.5, 1.7, 8.0]))  # an even split is 8, and a fifth of that 1.6
    assert quantizer.revive(vectors, generator) == 1
    assert torch.equal(quantizer.codebook[[0, 2, 3]], before[[0, 2, 3]])
    assert (vectors == quantizer.codebook[1]).all(dim=1).any()
    assert quantizer.counts.tolist() == pytest.approx([5.0, 8.0, 1.7, 8.0])
    torch.testing.assert_close(quantizer.sums[1], 8 * quantizer.codebook[1].detach())
    assert quantizer.revive(vectors, generator) == 0


def test_more_dead_codes_than_vectors():
    quantizer = VectorQuantizer(10, 2)
    assert quantizer.revive(torch.randn(4, 2)) == 10
    assert len(quantizer.codebook.unique(dim=0)) == 4


def test_without_revival_far_codes_are_never_used():
    far, alive = VectorQuantizer(32, 2, revive_below=0), VectorQuantizer(32, 2)
    used = []
    for quantizer in (far, alive):
        generator = torch.Generator().manual_seed(4)
        for _ in range(30):
            got = quantizer(5 + torch.randn(2, 2, 8, 8, generator=generator), generator)
        used.append(got.perplexity.item())
    assert used[0] < 4
    assert used[1] > 20


def test_perplexity_counts_codes_in_even_use():
    quantizer = random_quantizer(codes=8, dim=2).eval()
    codes = quantizer.codebook.detach()
    one = codes[3].view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert quantizer(one).perplexity == pytest.approx(1)
    assert quantizer(codes.T.reshape(1, 2, 2, 4)).perplexity == pytest.approx(8)
    uneven = codes[[0, 0, 0, 1]].T.reshape(1, 2, 2, 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert quantizer(uneven).perplexity == pytest.approx(math.exp(entropy))


def test_same_seed_same_codebook():
    books = []
    for seed in (5, 5, 6):
        torch.manual_seed(0)
        quantizer, generator = VectorQuantizer(16, 3), torch.Generator().manual_seed(seed)
        for step in range(5):
            quantizer(torch.randn(2, 3, 4, 4, generator=step_generator(0, step)), generator)
        books.append(quantizer.codebook.detach())
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_the_autoencoder_has_the_parts_of_the_other():
    cfg = VAEConfig.mini()
    model, other = VQAutoencoder(cfg, codes=32).eval(), AutoencoderKL(cfg)
    model.encoder.load_state_dict(other.encoder.state_dict())
    model.decoder.load_state_dict(other.decoder.state_dict())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    recon, got = model(x)
    assert recon.shape == x.shape
    assert got.codes.shape == (2, 8, 8)
    assert torch.equal(model.decode_codes(got.codes), recon)  # 64 whole numbers are all it takes


@pytest.mark.parametrize("ema", [True, False])
def test_it_learns_shapes_and_uses_its_codes(ema):
    torch.manual_seed(0)
    model = VQAutoencoder(VAEConfig(widths=(24,), blocks=1, groups=4, mid_attention=False, patch=4), codes=32, ema=ema)
    shapes, seen = Shapes(seed=7), []

    def loss_at(step):
        x = shapes.draw(range(16 * step, 16 * step + 16)).images
        recon, got = model(x, step_generator(0, step))
        error = F.mse_loss(recon, x)
        seen.append(got)
        return error + got.loss, {"recon": error}

    steps = list(fit(model, loss_at, Fit(steps=60, lr=5e-3, warmup=5, ema=0)))
    errors = [p.parts["recon"] for p in steps]
    assert sum(errors[-5:]) < 0.4 * sum(errors[:5])
    assert seen[-1].perplexity > 4
    assert len(seen[-1].codes.unique()) > 8


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="0 vectors"):
        VectorQuantizer(0, 3)
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        VectorQuantizer(4, 3, decay=1.0)
    with pytest.raises(ValueError, match=r"revive_below -0\.1"):
        VectorQuantizer(4, 3, revive_below=-0.1)
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\), and was given \(1, 4, 8, 8\)"):
        VectorQuantizer(4, 3)(torch.zeros(1, 4, 8, 8))
    model = VQAutoencoder(VAEConfig(widths=(8, 8), blocks=1, groups=4, mid_attention=False), codes=4).eval()
    for shape in ((1, 3, 15, 16), (1, 3, 16, 15), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=rf"multiples of 2, and was given \({', '.join(map(str, shape))}\)"):
            model.encode(torch.zeros(*shape))
    with pytest.raises(ValueError, match=r"\[0, 4\), and was given \(1, 2, 2\) up to 4"):
        model.decode_codes(torch.full((1, 2, 2), 4))
