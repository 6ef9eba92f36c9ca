"""The U-Net's zero start, its complaints, and the time embedding; its parity with the reference is in test_parity."""

import pytest
import torch

from minildm.attention import SpatialTransformer
from minildm.blocks import timestep_embedding
from minildm.unet import UNet, UNetConfig

TINY = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=12, pooled_dim=6, groups=4, patch=2)


def inputs(b: int = 2) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(b, 4, 8, 8),
        "t": torch.arange(b),
        "context": torch.randn(b, 5, 12),
        "pooled": torch.randn(b, 6),
    }


def test_an_untrained_network_predicts_zero_and_hears_everything_once_it_has_weights():
    unet, given = UNet(TINY), inputs()
    assert not unet(**given).any()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = unet(**given)
    assert out.shape == given["x"].shape
    for name in given:
        changed = given | {name: given[name] + 1}
        assert not torch.allclose(out, unet(**changed)), f"deaf to {name}"


def test_residuals_reach_every_skip_and_the_middle():
    unet, given = UNet(TINY), inputs()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    shapes = [(8, 4, 4), (8, 4, 4), (8, 2, 2), (16, 2, 2), (16, 2, 2)]  # conv_in, ResBlock, down, ResBlock, middle
    zeros = [torch.zeros(2, *shape) for shape in shapes]
    plain = unet(**given)
    assert torch.equal(plain, unet(**given, residuals=zeros))
    for k in range(len(zeros)):
        residuals = [z + (i == k) * torch.randn_like(z) for i, z in enumerate(zeros)]
        assert not torch.allclose(plain, unet(**given, residuals=residuals))
    with pytest.raises(ValueError, match="4 residuals; expected 4 for the skip connections and 1"):
        unet(**given, residuals=zeros[1:])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 8, 8), r"expected \(B, 4, H, W\)"),
        ("x", torch.zeros(2, 4, 6, 8), "multiples of 4"),
        ("context", torch.zeros(2, 5, 13), r"expected \(2, L, 12\)"),
        ("context", torch.zeros(1, 5, 12), r"expected \(2, L, 12\)"),
        ("pooled", None, r"pooled is None; expected \(2, 6\)"),
        ("pooled", torch.zeros(2, 7), r"pooled is \(2, 7\)"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        UNet(TINY)(**inputs() | {name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"depths": (1,)}, "one entry a level"), ({"groups": 5}, "does not divide into 5 groups")],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"widths": (8, 16), "depths": (0, 1), "heads": (2, 2), "groups": 4} | fields)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        SpatialTransformer(channels=8, context_dim=4, heads=3, groups=4)


def test_the_time_embedding_tells_times_apart_and_puts_cosines_first():
    e = timestep_embedding(torch.tensor([0, 1, 500, 999]), 8)
    assert e.shape == (4, 8)
    assert e[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.cdist(e, e).add(torch.eye(4)).min() > 0.1
    with pytest.raises(ValueError, match="must be even"):
        timestep_embedding(torch.tensor([1]), 7)
