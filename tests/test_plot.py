"""Sheets of pictures: the right size, the right pixels in the right place, captions below."""

import numpy as np
import pytest
import torch

from minildm.plot import caption_grid, to_pil


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
