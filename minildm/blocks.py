"""The building blocks of every network here: the time embedding, the residual block, and the two changes of resolution.

The autoencoder and the U-Net are made of the same residual block.  The autoencoder leaves its socket for the time empty.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Writes each timestep as cosines and sines of falling frequency, so that near times look alike.

    Args:
        t: timesteps, (B,), any real numbers.
        dim: length of the embedding, even: the first half cosines, the second half sines.
        max_period: the longest wavelength, in timesteps (over 2 pi).

    Returns:
        (B, dim) float32.  Vaswani et al. 2017, section 3.5, in the order that Stable Diffusion uses.

    Raises:
        ValueError: dim is odd.
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; the embedding is half cosines and half sines, so it must be even")
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two normalised convolutions whose result is added to their input; the time embedding, if any, is added in between.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; if they differ, the input passes a 1x1 convolution before the sum.
        time_dim: width of the time embedding, or None for a block that knows no time.
        groups: groups of each GroupNorm; must divide both channel counts.
        eps: what GroupNorm adds to the variance.  Stable Diffusion has 1e-5 in the U-Net and 1e-6 in the autoencoder.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) and time (B, time_dim) to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2.

    Args:
        channels: of the input and the output.
        pad_evenly: True pads one pixel on every side, as the U-Net does; False pads the right and the bottom alone, as the
            autoencoder does.  Published weights fit only their own way.
    """

    def __init__(self, channels: int, pad_evenly: bool = True):
        super().__init__()
        self.pad_evenly = pad_evenly
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1 if pad_evenly else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(x if self.pad_evenly else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating every pixel, then smooths with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
