"""The judge is right about real pictures, and caption accuracy counts what captions name and nothing else."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from minildm.__main__ import _parser
from minildm.metrics import CaptionAccuracy, Judge, caption_accuracy, load_judge
from minildm.recipes import judge_accuracy, train_judge
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
