"""Sheets of pictures: the right size, the right pixels in the right place, captions below."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minildm.plot import DescribedImage, LiveCurve, caption_grid, explore, figure, show, show_rows, to_pil


def test_a_picture_keeps_its_pixels():
    image = torch.tensor([[[0.0, 1.0]], [[0.5, 2.0]], [[-1.0, 0.25]]])
    assert np.array(to_pil(image)).tolist() == [[[0, 128, 0], [255, 255, 64]]]


def test_pictures_stand_in_rows_over_their_captions():
    colors = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 32, 32)
    sheet = np.array(
        caption_grid(colors, ["red", "green", "a long caption that has to be wrapped into lines"], columns=2, side=64)
    )
    assert sheet.shape[1] == 12 + 2 * 76
    assert sheet[44, 44].tolist() == [255, 0, 0]
    assert sheet[44, 120].tolist() == [0, 255, 0]
    below = sheet[12 + 64 + 2 : 12 + 64 + 16, 12:76]
    assert (below < 128).any()  # ink
    third = sheet.shape[0] // 2 + 30
    assert sheet[third, 44].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("count", "captions"), [(0, []), (2, ["one"])])
def test_a_caption_for_each_picture(count, captions):
    with pytest.raises(ValueError, match="expected one for each"):
        caption_grid(torch.zeros(count, 3, 8, 8), captions)


def pixels_of(image: DescribedImage) -> np.ndarray:
    """The picture that a notebook would show."""
    data = re.search(r'src="data:image/png;base64,([^"]+)"', image._repr_html_()).group(1)
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_grid_carries_its_words_and_its_pixels():
    image = show(torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 8, 8), alt='red,\n green & "blue"', side=32)
    assert repr(image) == 'red, green & "blue"'
    assert 'alt="red, green &amp; &quot;blue&quot;"' in image._repr_html_()
    assert pixels_of(image)[28, 28].tolist() == [255, 0, 0]
    assert pixels_of(image)[28, 28 + 44].tolist() == [0, 255, 0]


def test_a_plot_is_drawn_once_and_closed():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    fig, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1], color="red")
    image = figure(fig, alt="a rising line")
    assert not plt.fignum_exists(fig.number)
    assert (pixels_of(image) == [255, 0, 0]).all(axis=-1).any()


@pytest.mark.parametrize("images", [torch.linspace(-1, 1, 192).view(1, 3, 8, 8), torch.linspace(0, 255, 192).view(1, 3, 8, 8)])
def test_pictures_of_another_range_are_refused(images):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        show(images, alt="a picture")


def test_no_figure_without_words():
    with pytest.raises(ValueError, match="alt is empty"):
        show(torch.zeros(1, 3, 8, 8), alt=" ")


def test_rows_carry_their_names_titles_and_pixels():
    red, green = (torch.eye(3)[k].view(1, 3, 1, 1).expand(2, 3, 8, 8) for k in range(2))
    image = show_rows({"picture": red, "rebuilt\nby us": list(green[:1])}, alt="red over green", titles=["a", "b"], side=32)
    sheet = pixels_of(image)
    assert repr(image) == "red over green"
    assert sheet.shape[0] == 22 + 2 * 38
    left = sheet.shape[1] - 2 * 38
    assert sheet[22 + 16, left + 16].tolist() == sheet[22 + 16, left + 38 + 16].tolist() == [255, 0, 0]
    assert sheet[22 + 38 + 16, left + 16].tolist() == [0, 255, 0]
    assert sheet[22 + 38 + 16, left + 38 + 16].tolist() == [255, 255, 255]  # a shorter row ends early
    for part in (sheet[22 : 22 + 32, : left - 4], sheet[60:92, : left - 4], sheet[:20, left : left + 32]):
        assert (part < 128).any()  # ink
    assert show_rows({"x": red}, alt="red", side=32).width == show_rows({"x": red}, alt="red", titles=["a", "b"], side=32).width


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ({}, (), "0 rows"),
        ({"a": torch.zeros(2, 3, 8, 8)}, ("one",), "title a column"),
        ({"a": -torch.ones(1, 3, 8, 8)}, (), "expected"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(rows, titles, message):
    with pytest.raises(ValueError, match=message):
        show_rows(rows, alt="nothing", titles=titles)


def test_rare_colours_survive_the_small_palette():
    generator = torch.Generator().manual_seed(0)
    pale = 0.94 + 0.06 * torch.rand(6, 3, 48, 48, generator=generator)  # thousands of whites, as a decoder paints them
    steps = torch.linspace(0, 1, 8)
    for k, (low, high) in enumerate([(0.2, 0.5), (0.5, 0.9), (0.1, 0.3)]):
        pale[k, 0, 20:28, 20:28] = 0.9 - 0.3 * steps  # and a small red thing of many shades
        pale[k, 1, 20:28, 20:28] = (low + (high - low) * steps)[:, None]
        pale[k, 2, 20:28, 20:28] = 0.1 + 0.5 * steps.flip(0)[:, None]
    sheet = pixels_of(show_rows({"": pale}, alt="colours", side=48))
    left = sheet.shape[1] - 6 * 54
    for k, picture in enumerate(pale):
        shown = sheet[4 : 4 + 48, left + 54 * k : left + 54 * k + 48].astype(int)
        assert np.abs(shown - np.array(to_pil(picture)).astype(int)).max() < 20


@pytest.fixture
def displayed(monkeypatch) -> list:
    """What a notebook would show, in order; a picture that replaces another is wrapped in a list."""
    shown = []

    class Handle:
        def update(self, thing):
            shown.append([thing])

    def display(*things, display_id=False):
        shown.extend(things)
        return Handle() if display_id else None

    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", display)
    return shown


def test_a_slider_that_is_moved_redraws_its_picture(displayed):
    widgets = pytest.importorskip("ipywidgets")
    asked = []

    def draw(t, noise):
        asked.append((t, noise))
        return show(torch.zeros(1, 3, 8, 8), alt=f"t {t}, noise {noise}", side=8)

    t, noise = widgets.IntSlider(value=3, max=9), widgets.IntSlider(value=1, max=2, description="which noise")
    assert explore(draw, t=t, noise=noise) is None
    *sliders, screen = displayed
    assert [s.description for s in sliders] == ["t", "which noise"]
    assert asked == [(3, 1)]
    t.value = 5
    noise.value = 2
    assert asked == [(3, 1), (5, 1), (5, 2)]
    assert [output["data"]["text/plain"] for output in screen.outputs] == ["t 5, noise 2"]
    assert 'alt="t 5, noise 2"' in screen.outputs[0]["data"]["text/html"]


def test_nothing_to_move_is_refused():
    with pytest.raises(ValueError, match="no sliders"):
        explore(lambda: None)


def test_a_curve_grows_in_its_place_and_ends_complete(displayed):
    pytest.importorskip("matplotlib.pyplot").switch_backend("agg")
    curve = LiveCurve(4, alt="It falls.", seconds=0)
    for value in (4.0, 2.0, 1.0, 0.5):
        curve.add(value)
    first, *later = displayed
    assert isinstance(first, DescribedImage)
    assert [str(picture) for [picture] in later] == ["It falls."] * 3
    assert curve.values == [4.0, 2.0, 1.0, 0.5]

    def ink(picture):
        return (pixels_of(picture) == [0x1F, 0x77, 0xB4]).all(axis=-1).sum()  # matplotlib's first colour: the mean

    assert ink(later[-1][0]) > ink(later[0][0]) > ink(first)


def test_a_curve_is_not_drawn_at_every_value(displayed):
    pytest.importorskip("matplotlib.pyplot").switch_backend("agg")
    curve = LiveCurve(50, alt="It falls.", seconds=1000)
    for value in range(50):
        curve.add(-value)
    assert len(displayed) == 2  # the first value and the last


@pytest.mark.parametrize(("steps", "alt"), [(0, "It falls."), (3, " ")])
def test_a_curve_of_nothing_or_without_words_is_refused(steps, alt):
    with pytest.raises(ValueError, match="at least one step, and a sentence"):
        LiveCurve(steps, alt=alt)
