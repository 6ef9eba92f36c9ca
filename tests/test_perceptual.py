"""LPIPS is the published one for the same weights, gives a gradient everywhere, and takes any features."""

import importlib.util
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import gaussian_blur

from minildm.data import Emoji
from minildm.folder import Pictures
from minildm.perceptual import LPIPS, VGGFeatures, load_features, load_lpips, unit
from minildm.recipes import train_features
from minildm.train import Fit
from minildm.vae import AutoencoderKL, VAEConfig, vae_loss

HEADS = Path(importlib.util.find_spec("lpips").origin).parent / "weights/v0.1/vgg.pth"


@pytest.fixture(scope="module")
def reference():
    """The published distance with its published heads, over torchvision's VGG16 convolutions with random weights."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # without the 124 million weights of the classifier, which LPIPS throws away
        patch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=make_layers(cfgs["D"])))
        import lpips

        torch.manual_seed(0)
        ref = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for p in ref.net.parameters():
        p.data.normal_(std=(2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)  # the signal neither dies nor explodes
    return ref


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory):
    """The backbone as torchvision stores it, and the heads that the lpips package brings."""
    stored = {f"features.{name.split('.', 1)[1]}": p for name, p in reference.net.named_parameters()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save({**stored, "classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)}, path)
    return path, HEADS


def pictures(*shape):
    x = torch.rand(*shape) * 2 - 1
    x[..., : shape[-1] // 2] = -1.0  # half of it empty
    return x


def test_equals_the_published_distance(reference, files):
    ours = load_lpips(*files)
    for shape in ((3, 3, 32, 32), (2, 3, 48, 37)):
        x, y = pictures(*shape), (pictures(*shape) * 0.9).requires_grad_()
        ref = reference(x, y)
        torch.testing.assert_close(ours(x, y), ref[:, 0, 0, 0], atol=1e-6, rtol=1e-6)
        assert ref.min() > 0.01
        (expected,) = torch.autograd.grad(ref.sum(), y)
        (gradient,) = torch.autograd.grad(ours(x, y).sum(), y)
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-4)


def test_equals_the_published_distance_without_heads(reference, files):
    ours = LPIPS(load_lpips(*files).features)
    x, y = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32)
    fx, fy = (reference.net(reference.scaling_layer(v)) for v in (x, y))
    expected = sum((a / (a.norm(dim=1, keepdim=True) + 1e-10) - b / (b.norm(dim=1, keepdim=True) + 1e-10))
                   .square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(fx, fy, strict=True))  # fmt: skip
    torch.testing.assert_close(ours(x, y), expected, atol=1e-6, rtol=1e-6)


def test_the_network_is_vgg16_up_to_its_last_convolution():
    ours, published = VGGFeatures().features, make_layers(cfgs["D"])[:30]
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in published.named_parameters()}
    assert [type(layer) for layer in ours] == [type(layer) for layer in published]
    assert sum(p.numel() for p in ours.parameters()) == 14_714_688
    assert sum(p.numel() for p in VGGFeatures.toy().parameters()) == 72_080
    assert not set(VGGFeatures().state_dict()) - {f"features.{name}" for name in published.state_dict()}


def test_a_toy_answers_at_three_resolutions():
    maps = VGGFeatures.toy()(pictures(2, 3, 32, 24))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 32, 24), (2, 32, 16, 12), (2, 64, 8, 6)]
    assert min(m.min() for m in maps) == 0  # after the ReLU, before the pooling
    strength = [m.square().mean().sqrt().item() for m in VGGFeatures.toy()(torch.rand(4, 3, 64, 64) * 2 - 1)]
    assert 0.5 < min(strength) <= max(strength) < 5  # untrained, and not yet faint


def test_by_hand_over_any_features():
    x = torch.tensor([[3.0, 0.0], [4.0, 1.0], [0.0, 0.0]]).view(1, 3, 1, 2)
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]).view(1, 3, 1, 2)
    distance = LPIPS(lambda p: [p], [torch.tensor([1.0, 2.0, 3.0])])
    # the first position: (0.6, 0.8, 0) and (0, 1, 0); the second points the same way in both
    torch.testing.assert_close(distance(x, y), torch.tensor([(1 * 0.6**2 + 2 * 0.2**2) / 2]))
    torch.testing.assert_close(LPIPS(lambda p: [p, p])(x, y), torch.tensor([0.6**2 + 0.2**2]))


def test_same_is_zero_symmetric_and_each_picture_for_itself():
    distance = LPIPS(VGGFeatures.toy())
    x, y = pictures(3, 3, 32, 32), pictures(3, 3, 32, 32)
    assert (distance(x, x) == 0).all()
    torch.testing.assert_close(distance(x, y), distance(y, x))
    torch.testing.assert_close(distance(x, y), torch.cat([distance(x[i : i + 1], y[i : i + 1]) for i in range(3)]))
    assert distance(x, y).min() > 0


def test_more_blur_is_further_away():
    distance, x = LPIPS(VGGFeatures.toy()), torch.rand(4, 3, 32, 32) * 2 - 1
    measured = torch.stack([distance(x, gaussian_blur(x, [7, 7], [sigma, sigma])) for sigma in (0.4, 0.7, 1.5)])
    assert (measured.diff(dim=0) > 0).all()


def test_the_shipped_features_mind_blur_more_than_a_squared_error_does():
    try:
        x = Emoji(size=32).batch(range(0, 1000, 20))[0]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    features, about = load_features()
    distance, generator = LPIPS(features), torch.Generator().manual_seed(0)
    blurred = gaussian_blur(x, [5, 5], [1.0, 1.0])
    error = (x - blurred).square().mean(dim=(1, 2, 3), keepdim=True)
    grained = x + error.sqrt() * torch.randn(x.shape, generator=generator)  # the same squared error
    moved = x.roll(1, dims=3)  # more than twice of it
    assert (x - moved).square().mean() > 2 * error.mean()
    assert distance(x, blurred).mean() > 1.5 * distance(x, grained).mean()
    assert distance(x, blurred).mean() > 1.2 * distance(x, moved).mean()
    assert "train_features" in about["recipe"]


def test_features_learn_to_tell_pictures_apart():
    few = Pictures(name="few", pixels=torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), captions=[""] * 6)
    few.pixels = few.pixels.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        features = VGGFeatures.toy()
        losses = [p.loss for p in train_features(features, few, Fit(steps=20, lr=2e-3, batch_size=16, warmup=3))]
        ends.append(features.features[0].weight.detach().clone())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(*ends)  # same seed, same features


def test_features_that_are_zero_give_a_gradient_of_zero_and_not_nan():
    x, y = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, requires_grad=True)
    LPIPS(lambda p: [p])(x, y).sum().backward()
    assert (y.grad == 0).all()
    y.grad = None
    y.square().sum(dim=1).sqrt().sum().backward()
    assert y.grad.isnan().all()  # what the obvious way gives
    assert (unit(x) == 0).all()


def test_it_is_a_ruler_and_not_trained():
    features = VGGFeatures.toy()
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), blocks=1, groups=4, mid_attention=False))
    distance = LPIPS(features, [torch.ones(c) for c in (16, 32, 64)])
    x = pictures(2, 3, 16, 16)
    recon, posterior = vae(x)
    loss, parts = vae_loss(x, recon, posterior, kl_weight=0, perceptual=distance, perceptual_weight=0.5)
    torch.testing.assert_close(loss, (x - recon).square().mean() + 0.5 * distance(x, recon).mean())
    loss.backward()
    assert vae.encoder.conv_in.weight.grad.abs().max() > 0
    assert parts["perceptual"] > 0
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_errors_say_what_was_given():
    distance = LPIPS(VGGFeatures.toy(), [torch.ones(c) for c in (16, 32, 64)])
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) and \(2, 3, 32, 32\)"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        distance(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="2 x 8 pixels"):
        distance(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"\[16, 32\] channels for features of \[16, 32, 64\]"):
        LPIPS(VGGFeatures.toy(), [torch.ones(16), torch.ones(32)])(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="negative"):
        LPIPS(VGGFeatures.toy(), [torch.tensor([1.0, -0.1])])


class Harmful:
    def __reduce__(self):
        return (open, ("harmed", "w"))


def test_files_that_are_missing_or_something_else(files, tmp_path, monkeypatch):
    vgg, heads = files
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth.*download\.pytorch\.org"):
        load_lpips("none.pth", heads)
    with pytest.raises(FileNotFoundError, match="package lpips"):
        load_lpips(vgg, "none.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight should be \(64, 3, 3, 3\), and is not in it"):
        load_lpips(heads, vgg)  # the wrong way round
    torch.save({f"lin{i}.model.1.weight": torch.zeros(1, 64, 1, 1) for i in range(5)}, "alex.pth")
    with pytest.raises(ValueError, match=r"lin1\.model\.1\.weight should be \(1, 128, 1, 1\), and is \(1, 64, 1, 1\)"):
        load_lpips(vgg, "alex.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(ValueError, match="another kind of file"):
        load_lpips(vgg, "list.pth")
    Path("short.pth").write_bytes(heads.read_bytes()[:1000])
    Path("harmful.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name, complaint in {
        "short.pth": "is damaged or no checkpoint",
        "harmful.pth": "could run code and was not opened",
    }.items():
        with pytest.raises(ValueError, match=f"{complaint}.*comes from .*package lpips"):
            load_lpips(vgg, name)
    assert not Path("harmed").exists()
    assert isinstance(load_lpips(vgg, heads), nn.Module)
