"""The judge is right about real pictures, and caption accuracy counts what captions name and nothing else."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from minildm.metrics import Judge, caption_accuracy, load_judge
from minildm.recipes import judge_accuracy, train_judge
from minildm.shapes import FIELDS, Shapes
from minildm.train import Fit


def test_the_shipped_judge_is_as_good_as_its_file_says():
    judge, about = load_judge()
    measured = judge_accuracy(judge, count=1000)
    assert measured >= 0.99
    assert measured == pytest.approx(float(about["accuracy"]), abs=0.005)
    assert "recipe" in about


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
    with pytest.raises(FileNotFoundError, match="train judge --size 48"):
        load_judge(size=48)


def test_a_judge_trains():
    judge = Judge(size=32, width=8)
    losses = [p.loss for p in train_judge(judge, Fit(steps=30, lr=3e-3, batch_size=32, warmup=5))]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert len(judge.heads) == len(FIELDS)
