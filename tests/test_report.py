"""A report on a model of one's own pictures: it finds copies, leaks and wrong captions that were put there on purpose."""

import io
import json

import pytest
import torch
from PIL import Image

import minildm
from minildm.folder import Pictures, to_pixels
from minildm.pipeline import Pipeline
from minildm.plot import to_pil
from minildm.report import denoising_loss, duplicates, evaluate, nearest_neighbour, write_report
from minildm.scores import kid
from minildm.shapes import Shapes
from minildm.shipped import load_clip

ABOUT = {"what": "a test", "data": "shapes", "licence": "MIT", "limits": "all"}


def pictures(rows: range, seed: int = 50) -> Pictures:
    x, captions = Shapes(size=32, seed=seed).batch(rows)
    return Pictures("some", ((x / 2 + 0.5) * 255).round().byte(), captions)


SEEN, HELD_OUT = pictures(range(40)), pictures(range(40, 64))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return minildm.load("shapes32").to("cpu")


@pytest.fixture(scope="module")
def report(pipe):
    return evaluate(pipe, SEEN, HELD_OUT, load_clip("shapes32")[0], count=24, steps=8)


class Copier(Pipeline):
    """Knows its training pictures by heart, mirrored, and draws the one of each caption; for another caption any of them."""

    def __call__(self, prompt, **_):
        x = self.decode(self.encode(SEEN.batch(range(40))[0].flip(-1) / 2 + 0.5))
        return torch.stack([x[SEEN.captions.index(p) if p in SEEN.captions else len(p) % 40] for p in prompt])


class Blind(Pipeline):
    """Draws black pictures."""

    def __call__(self, prompt, **_):
        return torch.zeros(len(prompt), 3, 32, 32)


def test_nearest_is_the_nearest():
    g = torch.Generator().manual_seed(0)
    rows, others = torch.randn(7, 2, 3, generator=g), torch.randn(9, 2, 3, generator=g)
    for mirrored in (None, others.flip(-1)):
        for row, d, k, ratio in zip(rows, *nearest_neighbour(rows, others, mirrored), strict=True):
            by_hand = [(row - other).square().mean().sqrt().item() for other in others]
            if mirrored is not None:
                flipped = [(row - other).square().mean().sqrt().item() for other in mirrored]
                by_hand = [min(pair) for pair in zip(by_hand, flipped, strict=True)]
            assert k == by_hand.index(min(by_hand))
            assert d.item() == pytest.approx(min(by_hand))
            assert ratio.item() == pytest.approx(min(by_hand) / sorted(by_hand)[1])
    assert nearest_neighbour(others, others)[0].tolist() == [0.0] * 9
    assert nearest_neighbour(others, others)[2].tolist() == [0.0] * 9
    with pytest.raises(ValueError, match=r"rows are \(7, 2, 3\) and others \(9, 6\)"):
        nearest_neighbour(rows, others.flatten(1))
    with pytest.raises(ValueError, match="and two others"):
        nearest_neighbour(rows, others[:1])


def test_one_picture_saved_twice_is_found():
    x = SEEN.batch(range(12))[0] / 2 + 0.5
    buffer = io.BytesIO()
    to_pil(x[3]).resize((96, 96), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=60)
    saved = to_pixels(Image.open(buffer).convert("RGB"), 32) / 255
    assert not torch.equal(saved, x[3])
    assert duplicates(torch.cat([x, saved[None], x[5:6].flip(-1)])) == [(3, 12), (5, 13)]
    assert duplicates(x) == []
    assert duplicates(torch.stack([saved, 1 - saved]), x) == [(0, 3)]


def test_a_good_model_has_a_good_report(report):
    figures = report.figures
    assert figures["pictures"] == {"seen": 40, "held_out": 24}
    assert figures["leaks"] == 0
    assert min(figures["reconstruction_psnr"].values()) > 25
    assert figures["loss"]["new"] == pytest.approx(figures["loss"]["seen"], rel=0.3), "neither set was trained on"
    assert figures["loss"]["new_with_others_captions"] > 1.3 * figures["loss"]["new"]
    assert figures["copied"]["copies"]["share"] > 0.8
    assert figures["copied"]["samples_new"]["share"] < 0.3 > figures["copied"]["held_out"]["share"]
    assert figures["own_picture"]["new"] == pytest.approx(figures["own_picture"]["seen"], rel=0.3)
    low, high = figures["kid"]["real_95"]
    assert low < 0 < high
    assert figures["kid"]["count"] == 24
    assert figures["kid"]["restored"] < figures["kid"]["samples"] + high
    for name in ("real", "samples"):
        assert figures["clip"][name]["score"] > figures["clip"][name]["with_others_captions"] + 20
        assert figures["clip"][name]["right_caption_first"] > 0.6
    assert sorted(report.worst) == list(range(24))
    assert set(report.captions["new"]) <= set(HELD_OUT.captions)
    assert all(x.min() >= 0 and x.max() <= 1 and x.shape[1:] == (3, 32, 32) for x in report.pictures.values())


def test_a_model_that_copies_is_found_out(pipe):
    figures = evaluate(Copier(**vars(pipe)), SEEN, HELD_OUT, count=40).figures
    for name in ("samples_seen", "samples_new"):
        assert figures["copied"][name]["share"] > 0.8
        assert figures["copied"][name]["interval_95"][0] > figures["copied"]["held_out"]["interval_95"][1]
    assert figures["nearest"]["samples_seen"] == pytest.approx(figures["nearest"]["copies"], rel=0.2)
    assert figures["nearest"]["samples_new"] == pytest.approx(figures["nearest"]["copies"], rel=0.2)
    assert figures["nearest"]["held_out"] > 2 * figures["nearest"]["copies"]
    assert figures["clip"] == {}


def test_a_model_that_draws_nothing_is_found_out(pipe):
    figures = evaluate(Blind(**vars(pipe)), SEEN, HELD_OUT, load_clip("shapes32")[0], count=40).figures
    assert figures["copied"]["samples_seen"]["share"] == 0
    assert figures["kid"]["samples"] > 2 * figures["kid"]["real_95"][1]
    samples = figures["clip"]["samples"]
    assert samples["score"] < samples["with_others_captions"] + 10
    assert samples["right_caption_first"] < 0.2


def test_own_pictures_are_those_of_the_captions(pipe):
    class Faithful(Pipeline):
        def __call__(self, prompt, **_):
            return torch.stack(
                [dict(zip(SEEN.captions, SEEN.pixels / 255, strict=True)).get(p, torch.ones(3, 32, 32)) for p in prompt]
            )

    figures = evaluate(Faithful(**vars(pipe)), SEEN, HELD_OUT, count=10).figures
    assert figures["own_picture"]["seen"] < 1e-4
    assert figures["own_picture"]["new"] > 0.3


def test_the_neighbours_shown_are_training_pictures(pipe):
    report = evaluate(Copier(**vars(pipe)), SEEN, HELD_OUT, count=8)
    known = {caption: SEEN[i][0] / 2 + 0.5 for i, caption in enumerate(SEEN.captions)}
    for caption, beside in zip(report.captions["seen"], report.pictures["seen_nearest"], strict=True):
        torch.testing.assert_close(beside, known[caption])


def test_a_leak_is_counted(pipe):
    mixed = Pictures("mixed", torch.cat([HELD_OUT.pixels[:8], SEEN.pixels[:3].flip(-1)]), HELD_OUT.captions[:11])
    assert evaluate(pipe, SEEN, mixed, count=2, steps=1).figures["leaks"] == 3


def test_wrong_captions_raise_the_loss(pipe):
    right = denoising_loss(pipe, HELD_OUT)
    wrong = denoising_loss(pipe, Pictures("wrong", HELD_OUT.pixels, HELD_OUT.captions[1:] + HELD_OUT.captions[:1]))
    assert wrong > 1.3 * right
    assert denoising_loss(pipe, HELD_OUT) == right
    assert denoising_loss(pipe, HELD_OUT, seed=1) != right


@torch.no_grad()
def test_the_loss_is_the_training_loss_at_timesteps_spread_evenly(pipe):
    z, told, g = (
        pipe.encode(SEEN.batch(range(40))[0] / 2 + 0.5),
        pipe.condition(SEEN.captions),
        torch.Generator().manual_seed(3),
    )
    t = ((torch.arange(40) + torch.rand(1, generator=g)) * 25).long()
    assert (t // 25).tolist() == list(range(40))
    noise = torch.randn(z.shape, generator=g)
    a = pipe.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
    answer = pipe.unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, **told)
    expected = (answer - (a.sqrt() * noise - (1 - a).sqrt() * z)).square().mean().item()
    assert denoising_loss(pipe, SEEN, repeats=1, seed=3) == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_report(pipe, report):
    again = evaluate(pipe, SEEN, HELD_OUT, load_clip("shapes32")[0], count=24, steps=8)
    assert again.figures == report.figures
    assert again.worst == report.worst


def test_the_range_of_kid_is_that_of_real_pictures(pipe, report):
    from minildm.metrics import toy_extractor

    features = toy_extractor("emoji")(torch.cat([SEEN.batch(range(40))[0], HELD_OUT.batch(range(24))[0]])).detach()
    g, (low, high) = torch.Generator().manual_seed(9), report.figures["kid"]["real_95"]
    inside = 0
    for _ in range(200):
        order = torch.randperm(64, generator=g)
        inside += low <= kid(features[order[:24]], features[order[24:48]], 1, 24, generator=g)[0] <= high
    assert 0.85 < inside / 200 < 1


def test_it_is_written_with_the_failures_first(report, tmp_path):
    write_report(report, tmp_path / "new", ABOUT)
    text = (tmp_path / "new" / "report.md").read_text()
    assert text.index("Model card") < text.index("Failures first") < text.index("Figures")
    assert "- **licence** MIT" in text
    assert "| copied | held out |" in text
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["figures"]["leaks"] == 0
    assert content["torch"] == torch.__version__
    with Image.open(tmp_path / "new" / "samples.png") as sheet:
        assert sheet.width > 700
    with pytest.raises(ValueError, match=r"lacks data, licence: say it in about=\{'data'"):
        write_report(report, tmp_path / "other", {"what": "x", "limits": "y", "licence": " "})
    assert not (tmp_path / "other").exists()


def test_it_refuses_what_would_flatter(pipe):
    with pytest.raises(ValueError, match="7 pictures are held out; keep at least 8"):
        evaluate(pipe, SEEN, pictures(range(7)))
    larger = Pictures("large", torch.zeros(8, 3, 64, 64, dtype=torch.uint8), ["black"] * 8)
    with pytest.raises(ValueError, match="pictures of 32 and 64 pixels for a model of 32"):
        evaluate(pipe, SEEN, larger)
