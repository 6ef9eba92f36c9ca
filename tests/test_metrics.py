"""The judge is right about real pictures; caption accuracy counts what captions name; toy scores know bad from good."""

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from minildm.__main__ import _parser
from minildm.folder import ImageFolder
from minildm.metrics import (
    CaptionAccuracy,
    Judge,
    caption_accuracy,
    load_judge,
    toy_extractor,
    toy_fid,
    toy_inception_score,
)
from minildm.recipes import judge_accuracy, train_judge
from minildm.scores import frechet_distance, inception_score, kid
from minildm.shapes import FIELDS, Shapes
from minildm.train import Fit


def test_the_shipped_judge_is_as_good_as_its_file_says():
    judge, about = load_judge()
    measured = judge_accuracy(judge, count=1000)
    assert measured >= 0.99
    assert measured == pytest.approx(float(about["accuracy"]), abs=0.005)
    default = _parser().parse_args(["judge"])
    assert about["recipe"] == f"python -m minildm judge --size 32 --objects 1 --steps {default.steps} --seed {default.seed}"


def test_the_judge_knows_the_held_out_pairs_and_bears_a_little_blur():
    judge, _ = load_judge()
    drawn = Shapes(split="held_out", seed=5).draw(range(500))
    assert caption_accuracy(judge.read(drawn.images), drawn.attributes).all_correct >= 0.99
    blurred = gaussian_blur(drawn.images, kernel_size=[5, 5], sigma=[0.6, 0.6])
    assert caption_accuracy(judge.read(blurred), drawn.attributes).all_correct >= 0.97


def test_the_judge_is_not_fooled_by_the_wrong_caption():
    judge, _ = load_judge()
    drawn = Shapes(seed=6).draw(range(400))
    read = judge.read(drawn.images)
    assert caption_accuracy(read, drawn.attributes.roll(1, dims=0)).all_correct < 0.02


def test_accuracy_counts_by_hand():
    read = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0], [1, 1, 2, 3, 4, 0, 0, 0]])
    asked = torch.tensor([[0, 1, 2, 3, 4, -1, -1, -1], [0, 0, 2, 3, 4, -1, -1, -1]])
    accuracy = caption_accuracy(read, asked)
    assert accuracy.all_correct == 0.5
    assert accuracy.each == {"background": 0.5, "size": 0.5, "color": 1.0, "shape": 1.0, "place": 1.0}
    assert accuracy.count == 2
    mentioned = torch.tensor([[True] * 8, [False, False, True, True, True, False, False, False]])
    assert caption_accuracy(read, asked, mentioned).all_correct == 1.0
    assert caption_accuracy(read, asked, mentioned).each["size"] == 1.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="same"):
        caption_accuracy(torch.zeros(2, 8), torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        Judge(size=32)(torch.zeros(1, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="minildm judge --size 48 --objects 2"):
        load_judge(size=48, objects=2)
    with pytest.raises(ValueError, match="multiple of 8"):
        Judge(size=36)
    two = Shapes(objects=2).draw(range(4)).attributes
    with pytest.raises(ValueError, match="second object"):
        caption_accuracy(two.index_fill(1, torch.tensor([5, 6, 7]), -1), two)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    accuracy = CaptionAccuracy(all_correct=0.9, each={}, count=100)
    low, high = accuracy.interval
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)  # Wilson's interval for 90 of 100, as in statistical tables
    draws = torch.rand(2000, 200, generator=torch.Generator().manual_seed(0)) < 0.9
    intervals = [CaptionAccuracy(d.float().mean().item(), {}, 200).interval for d in draws]
    assert 0.93 < sum(low <= 0.9 <= high for low, high in intervals) / 2000 < 0.97


@pytest.mark.parametrize("objects", [1, 2])
def test_a_judge_trains(objects):
    judge = Judge(size=32, objects=objects, width=8)
    losses = [p.loss for p in train_judge(judge, Fit(steps=30, lr=3e-3, batch_size=32, warmup=5))]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    read = judge.read(Shapes(objects=objects).draw(range(3)).images)
    assert read.shape == (3, len(FIELDS))
    assert (read[:, 5:] >= 0).all() == (objects == 2)


# --------------------------------------------------------------------------------------------------------------- toy scores


def test_toy_features_are_those_of_the_shipped_networks():
    judge, _ = load_judge()
    x = Shapes(seed=7).draw(range(5)).images
    assert torch.equal(judge.heads[2](toy_extractor("shapes")(x)), judge(x)[2])
    assert toy_extractor("shapes")(x).shape == (5, 256)
    emoji = toy_extractor("emoji")(torch.rand(2, 3, 48, 40))
    assert emoji.shape == (2, 16 + 32 + 64)
    even = toy_extractor("emoji")(torch.full((1, 3, 32, 32), -1.0).roll(3, dims=2))
    torch.testing.assert_close(even, toy_extractor("emoji")(torch.full((1, 3, 32, 32), -1.0)))
    with pytest.raises(ValueError, match='"shapes" and "emoji", and not for "cats"'):
        toy_extractor("cats")


def test_toy_fid_grows_as_pictures_get_worse():
    real, other = (Shapes(seed=seed).draw(range(400)).images for seed in (8, 9))
    noise = torch.randn(other.shape)
    worse = [other, gaussian_blur(other, [5, 5], [1.0, 1.0]), gaussian_blur(other, [9, 9], [2.0, 2.0])]
    by_blur = [toy_fid(real, fake, "shapes") for fake in worse]
    by_noise = [toy_fid(real, other + strength * noise, "emoji") for strength in (0, 0.1, 0.3)]
    for measured in (by_blur, by_noise):
        assert measured[0] * 1.1 < measured[1]
        assert measured[1] * 1.3 < measured[2]
    alike = toy_extractor("shapes")
    with torch.no_grad():
        assert by_blur[0] == pytest.approx(frechet_distance(alike(real), alike(other)), rel=1e-6)
    assert toy_fid(real, real, "shapes") < 1e-3 * by_blur[0]


def test_toy_features_of_emoji_tell_clean_from_blurred():
    samples = ImageFolder(Path(__file__).parent.parent / "datasets/samples/emoji", size=32)
    x = samples.batch(range(len(samples)))[0]
    look = toy_extractor("emoji")
    with torch.no_grad():
        one, *others = look(x[::2]), look(x[1::2]), *(look(gaussian_blur(x[1::2], [9, 9], [s, s])) for s in (1.0, 2.0))
    clean, soft, blurred = (kid(one, other, subset_size=24, subsets=1)[0] for other in others)
    assert clean * 1.5 < soft
    assert soft * 1.5 < blurred


def test_the_toy_inception_score_counts_colours_and_shapes():
    drawn = Shapes(seed=10).draw(range(480))
    score, _ = toy_inception_score(drawn.images, splits=1)
    assert 30 < score <= 48
    judge, _ = load_judge()
    with torch.no_grad():
        color, shape = (judge(drawn.images)[k].softmax(dim=1) for k in (2, 3))
    both = (color[:, :, None] * shape[:, None, :]).flatten(1)
    assert score == pytest.approx(inception_score(both, splits=1, probabilities=True)[0], rel=1e-5)
    red = drawn.images[drawn.attributes[:, 2] == 0]  # one colour of eight
    assert 4 < toy_inception_score(red, splits=1)[0] < 6.5
    one = drawn.images[:1].expand(100, -1, -1, -1)
    assert toy_inception_score(one) == pytest.approx((1, 0), abs=1e-5)
    first, again = (toy_inception_score(drawn.images, splits=4, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert first == again
    assert first[0] < score


def test_the_judge_of_two_objects_does_not_mind_which_is_named_first():
    judge, about = load_judge(size=64, objects=2)
    assert judge_accuracy(judge, count=500) == pytest.approx(float(about["accuracy"]), abs=0.01)
    drawn = Shapes(size=64, objects=2, seed=8).draw(range(300))
    read = judge.read(drawn.images)
    assert caption_accuracy(read, drawn.attributes).all_correct >= 0.99
    turned = drawn.attributes[:, [0, 5, 6, 7, 4, 1, 2, 3]]
    turned[:, 4] = torch.tensor([5, 6, 7, 8, 9, 6, 5, 8, 7])[turned[:, 4]]  # above and below change places, left and right too
    assert caption_accuracy(read, turned).all_correct >= 0.99
    wrong = drawn.attributes.clone()
    wrong[:, 4] = turned[:, 4]  # "a above b" where it is below
    assert caption_accuracy(read, wrong).all_correct < 0.1
