"""The scores of many pictures equal the reference libraries' on the same features, and behave as their papers say."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from minildm.scores import (
    FeatureStatistics,
    clip_score,
    extract,
    fid,
    frechet_distance,
    frechet_gaussians,
    inception_score,
    kid,
    precision_recall,
)

with warnings.catch_warnings():  # what they warn of while being imported is their affair
    warnings.simplefilter("ignore")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchmetrics.multimodal.clip_score import CLIPScore


class AsTheyAre(nn.Module):
    """Hands features to torchmetrics as if they were pictures."""

    num_features = 24

    def forward(self, features):
        return features


def quietly(metric, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric(*args, **kwargs)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def features():
    """Two sets of unlike size, mean and covariance, (300, 24) and (240, 24), after a ReLU as real features are."""
    real = torch.randn(300, 24) @ torch.randn(24, 24) + 1
    fake = torch.randn(240, 24) @ torch.randn(24, 24) + 2 * torch.rand(24)
    return real.relu(), fake.relu()


def test_frechet_equals_torchmetrics(features):
    metric = quietly(FrechetInceptionDistance, feature=AsTheyAre())
    for side, real in zip(features, (True, False), strict=True):
        for batch in side.split(70):
            metric.update(batch, real=real)
    assert frechet_distance(*features) == pytest.approx(metric.compute().item(), rel=1e-3)
    assert frechet_distance(*features) > 10


def test_the_root_equals_scipys():
    S, T = (a @ a.T / 60 for a in torch.randn(2, 40, 60, dtype=torch.float64))
    zero = torch.zeros(40)
    expected = S.trace() + T.trace() - 2 * sqrtm(S.numpy() @ T.numpy()).trace().real
    assert frechet_gaussians(zero, S, zero, T) == pytest.approx(expected.item(), rel=1e-9)


def test_the_root_of_covariances_that_lack_directions_is_real():
    S, T = torch.diag(torch.tensor([4.0, 9.0, 0.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0, 25.0, 0.0]))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    S, T = (turn @ c.double() @ turn.T for c in (S, T))
    zero = torch.zeros(4)
    assert frechet_gaussians(zero, S, zero, T) == pytest.approx(13 + 26 - 2 * 2, abs=1e-6)


def test_one_feature_by_hand():
    # a normal distribution of mean 1 and deviation 2 beside one of mean 4 and deviation 7: 3^2 + 5^2
    apart = frechet_gaussians(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([4.0]), torch.tensor([[49.0]]))
    assert apart == pytest.approx(34)
    x = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2: divided by one less than the count
    assert frechet_distance(x, 3 * x + 4) == pytest.approx((7 - 1) ** 2 + (3 - 1) ** 2 * 2)


def test_the_distance_is_a_distance(features):
    real, fake = features
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(fake, real), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    assert frechet_distance(real.double() @ turn, fake.double() @ turn) == pytest.approx(frechet_distance(*features), rel=1e-9)
    assert frechet_distance(real + 5, fake + 5) == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert frechet_distance(3 * real, 3 * fake) == pytest.approx(9 * frechet_distance(*features), rel=1e-5)
    assert frechet_distance(real, real + 1) == pytest.approx(24, rel=1e-5)


def test_rounding_never_takes_the_distance_below_zero():
    for seed in range(20):
        x = torch.randn(60, 40, generator=seeded(seed)) * 1000
        assert frechet_distance(x, x[torch.randperm(60, generator=seeded(seed))]) >= 0


def test_few_pictures_make_the_distance_larger_and_kid_not():
    def both(count, seed):
        x, y = torch.randn(2, count, 16, generator=seeded(seed))
        return frechet_distance(x, y), kid(x, y, subsets=1, subset_size=count, generator=seeded(0))[0]

    few, many = (torch.tensor([both(count, seed) for seed in range(40)]) for count in (40, 400))
    assert few[:, 0].mean() > 5 * many[:, 0].mean() > 5 * 0.1  # the truth is 0
    error = few[:, 1].std() / math.sqrt(40)
    assert few[:, 1].mean().abs() < 3 * error
    assert few[:, 1].min() < 0  # which a distance that is right on average must be now and then


def test_fewer_pictures_than_features_are_warned_of():
    x = torch.randn(60, 20)
    with pytest.warns(UserWarning, match="20 pictures for 20 features"):
        frechet_distance(x[:20], x)
    with pytest.warns(UserWarning, match="20 pictures for 20 features"):
        frechet_distance(x, x[:20])
    frechet_distance(x[:21], x)  # pytest makes any warning an error


def test_statistics_batch_by_batch_are_those_of_the_whole():
    x = torch.randn(101, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 3
    stats = FeatureStatistics()
    for batch in x.split([1, 30, 50, 20]):
        assert stats.update(batch) is stats
    assert stats.count == 101
    np.testing.assert_allclose(stats.mean, np.mean(x.numpy(), axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10)
    y = torch.randn(50, 8)
    other = FeatureStatistics().update(y)
    assert frechet_distance(stats, y) == pytest.approx(frechet_distance(x, other), rel=1e-9)
    published = frechet_gaussians(stats.mean, stats.covariance, other.mean, other.covariance)
    assert published == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_statistics_keep_their_digits_far_from_zero():
    x = torch.randn(200, 4, dtype=torch.float64)
    stats = FeatureStatistics()
    for batch in (x + 1e7).split(20):
        stats.update(batch)
    np.testing.assert_allclose(stats.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-6, atol=1e-7)


def test_statistics_do_not_change_what_they_were_given():
    stats, x = FeatureStatistics(), torch.randn(5, 3, dtype=torch.float64)
    mean = stats.update(x).mean
    before = mean.clone()
    stats.update(x + 1)
    assert torch.equal(mean, before)


def test_fid_looks_at_batches_and_keeps_no_gradient(features):
    real, fake = (side.view(-1, 6, 2, 2) for side in features)
    seen = []

    def extractor(images):
        seen.append(len(images))
        assert not torch.is_grad_enabled()
        return images.flatten(1)

    expected = frechet_distance(*features)
    assert fid(real, fake, extractor, batch_size=128) == pytest.approx(expected, rel=1e-9)
    assert seen == [128, 128, 44, 128, 112]
    assert fid(iter(real.split(7)), fake.split(100), extractor) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(torch.cat([*extract(fake, extractor, batch_size=50)]), features[1])
    weight = torch.ones((), requires_grad=True)
    assert not next(iter(extract([real], lambda images: weight * images.flatten(1)))).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("subset_size", [240, 50])
def test_kid_equals_torchmetrics_subset_by_subset(features, subset_size):
    metric = quietly(KernelInceptionDistance, feature=AsTheyAre(), subsets=5, subset_size=subset_size)
    metric.update(features[0], real=True)
    metric.update(features[1], real=False)
    torch.manual_seed(3)
    mean, std = (value.item() for value in metric.compute())
    ours = kid(*features, subsets=5, subset_size=subset_size, generator=seeded(3))
    assert ours == pytest.approx((mean, std), rel=1e-3)
    assert std > 0.01 * mean > 0


def test_kid_by_hand():
    x, y = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    # products, halved, plus one, cubed: x1.x2 = 2 gives 8, y1.y2 = 2 gives 8; x1.y = 0, 2 and x2.y = -2, 0 give 1, 8, 0, 1
    expected = 8 + 8 - 2 * (1 + 8 + 0 + 1) / 4
    assert kid(x, y, subsets=3, subset_size=2) == pytest.approx((expected, 0), abs=1e-12)


def test_the_inception_score_equals_both_references(features):
    logits = features[0] * torch.linspace(0.1, 3, 24)
    metric = quietly(InceptionScore, feature=AsTheyAre(), splits=10)
    metric.update(logits)
    torch.manual_seed(4)
    mean, std = (value.item() for value in metric.compute())
    ours = inception_score(logits, splits=10, generator=seeded(4))
    assert ours[0] == pytest.approx(mean, rel=1e-3)
    # theirs is the deviation of a sample, divided by 9; the published code's, and torch-fidelity's, divides by 10
    assert ours[1] == pytest.approx(std * math.sqrt(9 / 10), rel=1e-3)
    shuffled = logits[torch.randperm(300, generator=seeded(4))]
    published = isc_features_to_metric(shuffled, splits=10, shuffle=False)
    assert ours == pytest.approx((published["inception_score_mean"], published["inception_score_std"]), rel=1e-6)
    assert std > 0.01


def test_the_inception_score_by_hand():
    clear = torch.eye(5).repeat(8, 1)  # every picture surely of one class, every class as often
    assert inception_score(clear, splits=1, probabilities=True) == pytest.approx((5, 0))
    assert inception_score(torch.full((40, 5), 0.2), probabilities=True) == pytest.approx((1, 0))  # none is clear
    assert inception_score(clear[:1].repeat(40, 1), probabilities=True) == pytest.approx((1, 0))  # one class only
    logits = torch.randn(100, 7)
    as_logits = inception_score(logits, generator=seeded(1))
    assert inception_score(logits.softmax(dim=1), probabilities=True, generator=seeded(1)) == pytest.approx(as_logits, rel=1e-5)
    assert inception_score(1000 * clear, splits=1) == pytest.approx((5, 0))
    in_order = torch.eye(4).repeat_interleave(50, dim=0)  # class by class: parts cut from this would hold one class each
    assert inception_score(in_order, splits=4, probabilities=True)[0] > 3.5


def brute(real, fake, k):
    """Precision and recall by the definition, one pair at a time."""
    real, fake = real.double().tolist(), fake.double().tolist()

    def share(points, by):
        radii = [sorted(math.dist(a, b) for j, b in enumerate(by) if i != j)[k - 1] for i, a in enumerate(by)]
        return sum(any(math.dist(p, b) <= r for b, r in zip(by, radii, strict=True)) for p in points) / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_brute_force(k):
    real, fake = torch.randn(90, 6), 0.8 * torch.randn(70, 6) + 0.5
    fake[:20] = 4 + 0.1 * torch.randn(20, 6)
    expected = brute(real, fake, k)
    assert precision_recall(real, fake, k=k) == expected
    assert precision_recall(real, fake, k=k, block=16) == expected
    assert 0.1 < expected[1] < 0.95
    assert 0.1 < expected[0] < 0.95
    assert expected[0] != expected[1]


def test_precision_and_recall_equal_torch_fidelitys():
    real, fake = torch.randn(200, 8, dtype=torch.float64), 0.7 * torch.randn(150, 8, dtype=torch.float64) + 0.4
    assert precision_recall(real, fake) == pytest.approx(calculate_precision_recall_full(fake, real), abs=1e-6)


def test_precision_and_recall_see_what_they_are_for():
    real = torch.cat([torch.randn(100, 4), torch.randn(100, 4) + 20])
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    precision, recall = precision_recall(real, torch.randn(100, 4))  # one mode of two
    assert precision > 0.8
    assert 0.35 < recall <= 0.5
    assert precision_recall(real[:100], real) == (brute(real[:100], real, k=3)[0], 1)


def test_copies_and_a_collapsed_generator_count_right():
    one = 100 * torch.rand(1, 300)
    assert precision_recall(one.repeat(10, 1), one.repeat(20, 1)) == (1, 1)
    real = torch.cat([one.repeat(10, 1), 100 * torch.rand(30, 300)])
    assert precision_recall(real, one.repeat(20, 1)) == (1, 0.25)


def test_the_clip_score_equals_torchmetrics():
    images, table = torch.rand(8, 3, 4, 4), 5 * torch.randn(8, 12)
    project = torch.randn(48, 12)

    class Stub(nn.Module):
        config = None

        def get_image_features(self, pixels):
            return (pixels - 0.5).flatten(1) @ project

        def get_text_features(self, ids, mask):
            return table[ids]

    def processor(images=None, text=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {"input_ids": torch.tensor([int(caption) for caption in text]), "attention_mask": torch.ones(len(text))}

    metric = quietly(CLIPScore, model_name_or_path=lambda: (Stub(), processor))
    embeddings, scores = Stub().get_image_features(images), []
    for i in range(8):  # one at a time: over many, torchmetrics cuts off their mean at 0, and the paper each
        metric.reset()
        metric.update(images[i], str(i))
        scores.append(metric.compute().item())
        assert clip_score(embeddings[i : i + 1], table[i : i + 1]) == pytest.approx(scores[-1], rel=1e-3)
    assert clip_score(embeddings, table) == pytest.approx(sum(scores) / 8, rel=1e-3)
    assert min(scores) == 0
    right = [i for i, score in enumerate(scores) if score > 0]
    assert len(right) > 2
    metric.reset()
    metric.update(images[right], [str(i) for i in right])
    assert clip_score(embeddings[right], table[right]) == pytest.approx(metric.compute().item(), rel=1e-3)


def test_the_clip_score_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    y = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]])
    assert clip_score(x[:1], y[:1]) == pytest.approx(100)
    assert clip_score(x, y) == pytest.approx(100 / 3)  # the last points the other way, which counts as 0 and not as -100
    assert clip_score(x[:1], torch.tensor([[1.0, 0.0]])) == pytest.approx(60)


def test_bad_features_are_named(features):
    real, fake = features
    broken = fake.clone()
    broken[7, 3] = math.nan
    for score in (frechet_distance, lambda a, b: kid(a, b, subset_size=10), precision_recall, clip_score):
        with pytest.raises(ValueError, match="nan or infinity, first in row 7"):
            score(real, broken)
        with pytest.raises(ValueError, match=r"\(300, 6, 4\); expected \(N, D\)"):
            score(real.view(300, 6, 4), fake)
        with pytest.raises(ValueError, match=r"columns|expected a caption|with one D"):
            score(real, fake[:, :20])
    with pytest.raises(ValueError, match=r"\(300, 0\)"):
        frechet_distance(real[:, :0], fake)
    with pytest.raises(ValueError, match="at least two rows of features, and there are 1"):
        frechet_distance(real[:1], fake)
    with pytest.raises(ValueError, match="of 0 pictures; expected at least 1"):
        frechet_distance(real[:0], fake)
    with pytest.raises(ValueError, match="there are 0"):
        fid([], [], AsTheyAre())
    with pytest.raises(ValueError, match="5 columns; the ones before had 24"):
        FeatureStatistics().update(real).update(real[:, :5])


def test_bad_statistics_are_named():
    mean, covariance = torch.zeros(3), torch.eye(3)
    for args in ((mean[:2], covariance), (mean, covariance[0]), (mean, covariance[:2])):
        with pytest.raises(ValueError, match="with one D"):
            frechet_gaussians(*args, mean, covariance)
        with pytest.raises(ValueError, match="with one D"):
            frechet_gaussians(mean, covariance, *args)
    with pytest.raises(ValueError, match="nan or infinity"):
        frechet_gaussians(mean, covariance, mean / 0, covariance)
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_gaussians(mean, covariance, mean, covariance + torch.eye(3).roll(1, 0))


def test_bad_settings_are_named(features):
    real, fake = features
    with pytest.raises(ValueError, match="240 pictures; expected at least 250; choose a smaller subset_size"):
        kid(real, fake, subset_size=250)
    with pytest.raises(ValueError, match="at least 1 subset, of at least 2"):
        kid(real, fake, subset_size=1)
    with pytest.raises(ValueError, match="at least 1 subset"):
        kid(real, fake, subsets=0, subset_size=10)
    with pytest.raises(ValueError, match="at least 4, to have a neighbour number 3"):
        precision_recall(real, fake[:3])
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(real, fake, k=0)
    with pytest.raises(ValueError, match="outputs of 5 pictures; expected at least 10"):
        inception_score(real[:5])
    with pytest.raises(ValueError, match="0 splits"):
        inception_score(real, splits=0)
    for not_probabilities in (real, torch.tensor([[1.5, -0.5]] * 20)):
        with pytest.raises(ValueError, match="each row sums to 1"):
            inception_score(not_probabilities, probabilities=True)
    with pytest.raises(ValueError, match="all zeros"):
        clip_score(torch.zeros(2, 3), torch.ones(2, 3))
