"""ControlNet: a copy of the U-Net's encoder is shown a hint, such as edges, and adds what it finds to a frozen U-Net.

The hint comes into the copy through a convolution of zeros, and what the copy says goes out through others, one to each skip
connection and one to the middle.  Zeros say nothing: training begins at the model's own pictures, and leaves them only as far
as the hint gives it reason to.  Zhang, Rao & Agrawala 2023.
"""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.blocks import timestep_embedding
from minildm.unet import UNet


def zero_conv(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Conv2d:
    """A convolution whose weights and bias start at zero; it keeps height and width.  Zhang et al. 2023, section 3.1.

    It puts out nothing at first, whatever comes in.  It learns all the same: the gradient of its weights is its *input* times
    what comes back, and its input is not zero.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(nn.Module):
    """Brings a hint from pixels to the size and channels of the U-Net's first features; its last convolution is of zeros.

    The others start with Gaussian weights, as in Zhang et al. 2023, section 3.2.

    Args:
        hint_channels: of the hint; 3 for the published ones, which are RGB pictures even where they show grey edges.
        widths: channels on the way; each but the last is followed by a step of stride 2, so that len(widths) - 1 of them shrink
            the hint by 2^(len(widths) - 1).  Published: 16, 32, 96, 256, for latents 8 times smaller than pictures.
        out_channels: the U-Net's first width.
    """

    def __init__(self, hint_channels: int, widths: tuple[int, ...], out_channels: int):
        super().__init__()
        convs = [nn.Conv2d(hint_channels, widths[0], kernel_size=3, padding=1)]
        for width, wider in pairwise(widths):
            convs.append(nn.Conv2d(width, width, kernel_size=3, padding=1))
            convs.append(nn.Conv2d(width, wider, kernel_size=3, padding=1, stride=2))
        for conv in convs:  # torch's smaller default would leave little of a hint
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        self.convs = nn.ModuleList(convs)
        self.out = zero_conv(widths[-1], out_channels, kernel_size=3)

    def forward(self, hint: Tensor) -> Tensor:
        """(B, hint_channels, H, W) to (B, out_channels, H / f, W / f), f = 2^(len(widths) - 1)."""
        for conv in self.convs:
            hint = F.silu(conv(hint))
        return self.out(hint)


class ControlNet(nn.Module):
    """A trainable copy of a U-Net's encoder that is shown a hint, and what it adds to the U-Net's skip connections.

    Args:
        unet: whose encoder to copy; it is not changed, and shares no weight with the copy.
        hint_widths: channels of the `HintEncoder`; pictures f times larger than the U-Net's first features need
            log2(f) + 1 of them.
        hint_channels: channels of the hint.
    """

    def __init__(self, unet: UNet, hint_widths: tuple[int, ...] = (16, 32, 96, 256), hint_channels: int = 3):
        super().__init__()
        self.cfg, self.hint_widths, self.hint_channels = unet.cfg, tuple(hint_widths), hint_channels
        self.time_mlp = deepcopy(unet.time_mlp)
        if unet.cfg.pooled_dim:
            self.pooled_mlp = deepcopy(unet.pooled_mlp)
        self.conv_in, self.down, self.mid = deepcopy(unet.conv_in), deepcopy(unet.down), deepcopy(unet.mid)
        self.requires_grad_(True)  # a frozen U-Net's copy would be frozen, too

        self.hint = HintEncoder(hint_channels, self.hint_widths, unet.cfg.widths[0])
        skips, last = [unet.cfg.widths[0]], len(unet.cfg.widths) - 1
        for i, width in enumerate(unet.cfg.widths):
            skips += [width] * unet.cfg.blocks + [width] * (i < last)
        self.zeros = nn.ModuleList([zero_conv(width, width) for width in skips])
        self.zero_mid = zero_conv(unet.cfg.widths[-1], unet.cfg.widths[-1])
        self.to(unet.conv_in.weight)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor, pooled: Tensor | None = None, scale: float = 1.0
    ) -> list[Tensor]:
        """What to add to the U-Net's features.

        Args:
            x: the same noisy latents that the U-Net is given, (B, C, H, W).
            t, context, pooled: as the U-Net is given them.
            hint: pixels, (B, hint_channels, H f, W f) in [0, 1], with f the hint encoder's factor over `cfg.patch`.
            scale: how strongly; 0 is silence, 1 as trained.

        Returns:
            The `residuals` of `UNet.forward`: one for each skip connection, in the order of the way down, then the middle's;
            12 + 1 for Stable Diffusion 1.5.

        Raises:
            ValueError: a shape does not fit; says which.
        """
        self._check(x, context, pooled)
        self._check_hint(x, hint)
        time = self.time_mlp(timestep_embedding(t, self.cfg.widths[0]).to(x.dtype))
        if pooled is not None:
            time = time + self.pooled_mlp(pooled)
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.cfg.patch, q=self.cfg.patch)

        h, skips = self.encode(self.conv_in(x) + self.hint(hint), time, context)
        h = self.mid(h, time, context)
        residuals = [zero(skip) for zero, skip in zip(self.zeros, skips, strict=True)] + [self.zero_mid(h)]
        return [scale * residual for residual in residuals]

    encode, _check = UNet.encode, UNet._check  # the copy goes the U-Net's way down, and refuses what it refuses

    def _check_hint(self, x: Tensor, hint: Tensor) -> None:
        factor = 2 ** (len(self.hint_widths) - 1)
        wanted = (len(x), self.hint_channels, *(side // self.cfg.patch * factor for side in x.shape[2:]))
        if tuple(hint.shape) != wanted:
            raise ValueError(
                f"hint is {tuple(hint.shape)}; expected {wanted}: pixels, {factor} to a side of each of the U-Net's first "
                f"positions, and latents of {x.shape[2]} x {x.shape[3]}"
            )


def controlled(unet: UNet, control: ControlNet, scale: float = 1.0) -> Callable[..., Tensor]:
    """A U-Net that listens to its ControlNet: what `guided` takes as a model, with the hint among the keywords.

    Args:
        unet: the frozen one, with whose copy the ControlNet began, or one trained further from it.
        control: its ControlNet.
        scale: how strongly it speaks; 0 is the U-Net alone.

    Returns:
        A function of x, t, context, hint and, if the U-Net has it, pooled, that predicts what the U-Net predicts.  For
        `guided`, the hint goes into both conditions: guidance is to follow the words, and either way the edges.

    Raises:
        ValueError: when called, a shape does not fit, or the hint is not in [0, 1]; says which.
    """

    def predict(x: Tensor, t: Tensor, context: Tensor, hint: Tensor, pooled: Tensor | None = None) -> Tensor:
        low, high = hint.min().item(), hint.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"the hint ranges from {low:.3g} to {high:.3g}; expected [0, 1]: divide bytes by 255")
        return unet(x, t, context, pooled, residuals=control(x, t, context, hint, pooled, scale))

    return predict
