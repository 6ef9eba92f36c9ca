"""The U-Net: it looks at a noisy latent, the time and the caption, and says what the noise is.

Down through the resolutions, across the middle, and up again with every step of the way down at hand.  Given
`UNetConfig.sd15()` this *is* Stable Diffusion's: 859,520,964 parameters.  Rombach et al. 2022; Ronneberger et al. 2015.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.attention import SpatialTransformer
from minildm.blocks import Downsample, ResBlock, Upsample, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Everything that shapes a U-Net; one entry a level, highest resolution first, where there is a tuple."""

    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each ResBlock
    mid_depth: int = 1  # transformer blocks in the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads
    blocks: int = 2  # ResBlocks a level on the way down; one more on the way up
    in_channels: int = 4
    out_channels: int = 4
    context_dim: int = 768  # features of the caption's tokens
    pooled_dim: int | None = None  # features of a vector added to the time embedding: pooled text, and in SDXL the sizes
    linear: bool = False  # linear layers, not 1x1 convolutions, into and out of the transformers
    groups: int = 32  # of every GroupNorm
    patch: int = 1  # space-to-depth before the first convolution and after the last

    def __post_init__(self):
        if not len(self.widths) == len(self.depths) == len(self.heads):
            raise ValueError(
                f"widths {self.widths}, depths {self.depths} and heads {self.heads}: one entry a level, the same number"
            )
        for width in self.widths:
            if width % self.groups:
                raise ValueError(
                    f"a width of {width} does not divide into {self.groups} groups; choose groups that divide {self.widths}"
                )

    @classmethod
    def sd15(cls) -> "UNetConfig":
        """Stable Diffusion 1.x: 859,520,964 parameters."""
        return cls()

    @classmethod
    def sd21(cls) -> "UNetConfig":
        """Stable Diffusion 2.x: 865,910,724 parameters."""
        return cls(heads=(5, 10, 20, 20), context_dim=1024, linear=True)

    @classmethod
    def sdxl(cls) -> "UNetConfig":
        """SDXL base: 2,567,463,684 parameters."""
        return cls(
            widths=(320, 640, 1280), depths=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context_dim=2048, pooled_dim=2816,
            linear=True,
        )  # fmt: skip

    @classmethod
    def sdxl_refiner(cls) -> "UNetConfig":
        """SDXL's refiner: 2,259,526,660 parameters."""
        return cls(
            widths=(384, 768, 1536, 1536), depths=(0, 4, 4, 0), mid_depth=4, heads=(6, 12, 24, 24), context_dim=1280,
            pooled_dim=2560, linear=True,
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> "UNetConfig":
        """For 8 x 8 latents and a laptop: 2,639,140 parameters."""
        return cls(
            widths=(64, 96), depths=(0, 1), heads=(4, 4), blocks=1, context_dim=128, pooled_dim=128, groups=8,
        )  # fmt: skip


class UNetLevel(nn.Module):
    """One resolution: ResBlocks, a transformer after each (or none), and a change of resolution at the end (or none)."""

    def __init__(self, cfg: UNetConfig, index: int, ins: list[int], resample: nn.Module | None):
        super().__init__()
        width, depth, heads = cfg.widths[index], cfg.depths[index], cfg.heads[index]
        self.res = nn.ModuleList([ResBlock(c, width, 4 * cfg.widths[0], cfg.groups) for c in ins])
        self.attn = nn.ModuleList(
            [SpatialTransformer(width, cfg.context_dim, heads, depth, cfg.linear, cfg.groups) for _ in ins if depth]
        )
        self.resample = resample

    def step(self, j: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """The j-th ResBlock and its transformer: (B, C, H, W) to (B, width, H, W)."""
        x = self.res[j](x, time)
        return self.attn[j](x, context) if self.attn else x


class UNetMiddle(nn.Module):
    """The lowest resolution: ResBlock, transformer, ResBlock."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        width, time_dim = cfg.widths[-1], 4 * cfg.widths[0]
        self.res1 = ResBlock(width, width, time_dim, cfg.groups)
        self.attn = SpatialTransformer(width, cfg.context_dim, cfg.heads[-1], cfg.mid_depth, cfg.linear, cfg.groups)
        self.res2 = ResBlock(width, width, time_dim, cfg.groups)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return self.res2(self.attn(self.res1(x, time), context), time)


class UNet(nn.Module):
    """The denoiser of latent diffusion.

    Args:
        cfg: its shape; see the presets of `UNetConfig`.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        first, time_dim = cfg.widths[0], 4 * cfg.widths[0]
        self.time_mlp = nn.Sequential(nn.Linear(first, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if cfg.pooled_dim:
            self.pooled_mlp = nn.Sequential(nn.Linear(cfg.pooled_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(cfg.in_channels * cfg.patch**2, first, kernel_size=3, padding=1)

        skips, channels, last = [first], first, len(cfg.widths) - 1
        self.down = nn.ModuleList()
        for i, width in enumerate(cfg.widths):
            ins = [channels] + [width] * (cfg.blocks - 1)
            self.down.append(UNetLevel(cfg, i, ins, Downsample(width) if i < last else None))
            skips += [width] * cfg.blocks + [width] * (i < last)
            channels = width

        self.mid = UNetMiddle(cfg)

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(cfg.widths))):
            ins = [(channels if j == 0 else width) + skips.pop() for j in range(cfg.blocks + 1)]
            self.up.append(UNetLevel(cfg, i, ins, Upsample(width) if i > 0 else None))
            channels = width

        self.norm_out = nn.GroupNorm(cfg.groups, first)
        self.conv_out = nn.Conv2d(first, cfg.out_channels * cfg.patch**2, kernel_size=3, padding=1)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Every branch begins by adding nothing, and the network by predicting zero: deep networks learn faster from there."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            if isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, residuals: list[Tensor] | None = None
    ) -> Tensor:
        """Predicts the noise, or what the model was trained to predict.

        Args:
            x: noisy latents, (B, C, H, W); H and W multiples of `cfg.patch` times 2 for each change of resolution.
            t: timesteps, (B,), integers or floats in [0, T).
            context: the caption's tokens, (B, L, context_dim).
            pooled: (B, pooled_dim), added to the time embedding; given if and only if the configuration has it.
            residuals: a ControlNet's, one for each skip connection and a last one for the middle; added to them.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: a shape does not fit; says which.
        """
        self._check(x, context, pooled)
        time = self.time_mlp(timestep_embedding(t, self.cfg.widths[0]).to(x.dtype))
        if pooled is not None:
            time = time + self.pooled_mlp(pooled)
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.cfg.patch, q=self.cfg.patch)

        h, skips = self.encode(self.conv_in(x), time, context)
        h = self.mid(h, time, context)
        if residuals is not None:
            if len(residuals) != len(skips) + 1:
                raise ValueError(
                    f"{len(residuals)} residuals; expected {len(skips)} for the skip connections and 1 for the middle"
                )
            skips = [skip + extra for skip, extra in zip(skips, residuals[:-1], strict=True)]
            h = h + residuals[-1]
        for level in self.up:
            for j in range(len(level.res)):
                h = level.step(j, torch.cat([h, skips.pop()], dim=1), time, context)
            h = level.resample(h) if level.resample is not None else h

        h = self.conv_out(F.silu(self.norm_out(h)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.cfg.patch, q=self.cfg.patch)

    def encode(self, h: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The way down from the first convolution's output: the lowest features, and every step's output for the way up."""
        skips = [h]
        for level in self.down:
            for j in range(len(level.res)):
                h = level.step(j, h, time, context)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        return h, skips

    def _check(self, x: Tensor, context: Tensor, pooled: Tensor | None) -> None:
        cfg = self.cfg
        f = cfg.patch * 2 ** (len(cfg.widths) - 1)
        if x.ndim != 4 or x.shape[1] != cfg.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"x is {tuple(x.shape)}; expected (B, {cfg.in_channels}, H, W) with H and W multiples of {f}")
        if context.ndim != 3 or context.shape[::2] != (len(x), cfg.context_dim):
            raise ValueError(f"context is {tuple(context.shape)}; expected ({len(x)}, L, {cfg.context_dim})")
        given, wanted = None if pooled is None else tuple(pooled.shape), cfg.pooled_dim and (len(x), cfg.pooled_dim)
        if given != wanted:
            raise ValueError(f"pooled is {given}; expected {wanted}: it goes with the configuration's pooled_dim")
