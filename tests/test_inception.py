"""Inception is the network of the published scores: its answers equal two other implementations', from shared weights."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from minildm.inception import Inception, enlarge_as_tensorflow, load_inception
from minildm.scores import fid
from minildm.train import Fit

with warnings.catch_warnings():  # what they warn of while being imported is their affair
    warnings.simplefilter("ignore")
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torchmetrics.image.fid import NoTrainInceptionV3


def random_inception(**settings):
    """Torchvision's network with weights that neither let a signal die nor hide where it went."""
    network = torchvision.models.inception_v3(weights=None, init_weights=False, **settings).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    nn.init.normal_(network.fc.weight, std=0.02)
    nn.init.normal_(network.fc.bias)
    return network


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_inception(num_classes=1008, aux_logits=False).state_dict(), path)
    return path


def test_inception_is_the_one_of_the_published_scores(published_file):
    ours = load_inception(published_file)
    wanted = {"2048": lambda x: ours(x), "logits_unbiased": lambda x: ours.logits(ours(x))}
    for name, answer in wanted.items():
        theirs = NoTrainInceptionV3("inception-v3-compat", [name], str(published_file), antialias=False)
        for size in ((32, 32), (320, 200)):
            pixels = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
            pixels[1, :, 10:] //= 8
            expected = theirs(pixels)
            close = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
            torch.testing.assert_close(answer(pixels / 127.5 - 1), expected, **close)
            assert expected.std(dim=0).mean() > 0.01 * expected.std()  # another picture, another answer
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training
    real, fake = (torch.rand(3, 3, 16, 16) * 2 - 1 for _ in range(2))
    with pytest.warns(UserWarning, match="3 pictures for 2048 features"):
        assert fid(real, fake, ours, batch_size=2) > 0


def test_inception_reads_pictures_as_if_they_had_been_saved(published_file):
    ours = load_inception(published_file)
    x = torch.randint(256, (2, 3, 16, 16)) / 127.5 - 1
    torch.testing.assert_close(ours(x + 0.4 / 127.5), ours(x))
    torch.testing.assert_close(ours(2 * x), ours((2 * x).clamp(-1, 1)))


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (64, 400), (1, 300)])
def test_pictures_grow_as_tensorflow_grew_them(size):
    x = torch.rand(2, 3, *size) * 255
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(enlarge_as_tensorflow(x, size=299), expected, atol=1e-3, rtol=1e-5)


def test_torchvisions_inception_is_read_with_a_warning(tmp_path):
    network = random_inception(num_classes=1000, aux_logits=True, transform_input=True)
    torch.save(network.state_dict(), tmp_path / "inception_v3_google-0cc3c7bd.pth")
    with pytest.warns(UserWarning, match="not the published FID"):
        ours = load_inception(tmp_path / "inception_v3_google-0cc3c7bd.pth")
    x = torch.rand(2, 3, 299, 299) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network(((x + 1) / 2 - mean) / std)  # as its documentation says
    close = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
    torch.testing.assert_close(ours.logits(ours(x)), expected, **close)
    assert ours(torch.rand(1, 3, 40, 20)).shape == (1, 2048)


def test_other_files_are_not_taken_for_inception(tmp_path, published_file):
    with pytest.raises(FileNotFoundError, match=r"comes from https://github.com/mseitzer/pytorch-fid/releases"):
        load_inception(tmp_path / "nothing.pth")
    stored = torch.load(published_file, weights_only=True)
    del stored["Mixed_7c.branch_pool.bn.running_var"]
    torch.save(stored, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"Mixed_7c.branch_pool.bn.running_var should be \(192,\), and is not in it"):
        load_inception(tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="another kind of file"):
        load_inception(tmp_path / "list.pth")
    torch.save({"fc.bias": Fit}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"could run code and was not opened.*comes from https"):
        load_inception(tmp_path / "code.pth")


def test_inception_names_what_it_cannot_read():
    inception = Inception()
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"floats \(B, 3, H, W\) in \[-1, 1\]"):
            inception(wrong)
