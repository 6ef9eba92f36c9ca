"""The diffusion transformer: a denoiser without a convolution, whose blocks learn of the time through their norms.

The latent is cut into patches, and a patch is a token.  Each block begins as the identity: its branches are multiplied by a
gate, the gate is read off the conditioning vector, and at the start it reads zero (adaLN-Zero).  Peebles & Xie 2023; the
caption's tokens are heard by cross-attention in between, as in PixArt-alpha (Chen et al. 2023).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.attention import CrossAttention
from minildm.blocks import timestep_embedding

TIME_FEATURES = 256  # length of the sinusoidal embedding of the time, whatever the width


@dataclass(frozen=True)
class DiTConfig:
    """Everything that shapes a diffusion transformer."""

    width: int = 1152  # features of a token
    depth: int = 28  # blocks
    heads: int = 16  # attention heads
    patch: int = 2  # side of the square of latents that makes one token
    mlp_ratio: int = 4  # how many times wider the hidden layer of a block is
    in_channels: int = 4
    out_channels: int = 4
    context_dim: int | None = None  # features of the caption's tokens; None for a network that has no cross-attention
    pooled_dim: int | None = None  # features of a vector added to the time embedding: pooled text, or a class as one-hot

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"a width of {self.width} must divide into {self.heads} heads, and into 4: sines and cosines of two axes"
            )

    @classmethod
    def xl2(cls) -> "DiTConfig":
        """DiT-XL/2 of the paper without its classes: 673,681,568 parameters.  It predicts noise and variance: 8 channels."""
        return cls(out_channels=8)

    @classmethod
    def tiny(cls) -> "DiTConfig":
        """For 8 x 8 latents and a laptop: a training step costs what one of `UNetConfig.tiny()` does, within 3 %."""
        return cls(width=192, depth=6, heads=6, context_dim=128, pooled_dim=128)


def sincos_2d(dim: int, height: int, width: int) -> Tensor:
    """Writes each place of a grid as sines and cosines: half of the features for its column, half for its row.

    Args:
        dim: features of a place, a multiple of 4: sines, then cosines, of the column; then the same of the row.
        height: rows of the grid.
        width: columns of the grid.

    Returns:
        (height * width, dim) float32, row by row, as the published networks have it.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; sines and cosines of two axes need a multiple of 4")
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [rearrange(axis, "h w -> (h w) 1") * frequencies for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Stretches and moves every token's features alike: x (B, L, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the caption (or none), MLP; the first and last modulated and gated by the condition.

    Args:
        width: features of a token, D.
        heads: number of heads; each is D / heads wide.
        context_dim: features of the caption's tokens, or None for no cross-attention.
        mlp_ratio: how many times wider the hidden layer of the MLP is.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None, mlp_ratio: int = 4):
        super().__init__()
        hidden, dim_head = mlp_ratio * width, width // heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = CrossAttention(width, heads=heads, dim_head=dim_head, bias=True)
        self.cross = CrossAttention(width, context_dim, heads, dim_head, bias=True) if context_dim else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, D), condition (B, D) and context (B, M, context_dim), if the block hears one, to (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=1)  # 6 times (B, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """From tokens to what is predicted for their patches: norm, modulation, one linear layer.

    Args:
        width: features of a token, D.
        out: numbers a token stands for.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, L, D) and condition (B, D) to (B, L, out)."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """A denoiser made of transformer blocks alone, called as the U-Net is.

    Args:
        cfg: its shape; see the presets of `DiTConfig`.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg = cfg
        self.patches = nn.Linear(cfg.in_channels * cfg.patch**2, cfg.width)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        if cfg.pooled_dim:
            self.pooled_mlp = nn.Sequential(nn.Linear(cfg.pooled_dim, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        blocks = [DiTBlock(cfg.width, cfg.heads, cfg.context_dim, cfg.mlp_ratio) for _ in range(cfg.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final = FinalLayer(cfg.width, cfg.out_channels * cfg.patch**2)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Every block begins as the identity, and the network by predicting zero; the rest as the paper's code has it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_mlp[0], self.time_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        silent = [block.modulation for block in self.blocks] + [self.final.modulation, self.final.linear]
        for layer in silent + [block.cross.to_out for block in self.blocks if block.cross is not None]:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """Predicts the noise, or what the model was trained to predict.

        Args:
            x: noisy latents, (B, C, H, W); H and W multiples of `cfg.patch`.
            t: times, (B,), integers or floats in [0, 1000].
            context: the caption's tokens, (B, L, context_dim); given if and only if the configuration has it.
            pooled: (B, pooled_dim), added to the time embedding; given if and only if the configuration has it.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: a shape does not fit; says which.
        """
        self._check(x, context, pooled)
        p, rows, columns = self.cfg.patch, x.shape[2] // self.cfg.patch, x.shape[3] // self.cfg.patch
        condition = self.time_mlp(timestep_embedding(t, TIME_FEATURES).to(x.dtype))  # (B, D)
        if pooled is not None:
            condition = condition + self.pooled_mlp(pooled)
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = self.patches(x)  # (B, L, D)
        x = x + sincos_2d(self.cfg.width, rows, columns).to(x)
        for block in self.blocks:
            x = block(x, condition, context)
        x = self.final(x, condition)  # (B, L, out_channels p p)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)

    def _check(self, x: Tensor, context: Tensor | None, pooled: Tensor | None) -> None:
        cfg = self.cfg
        if x.ndim != 4 or x.shape[1] != cfg.in_channels or x.shape[2] % cfg.patch or x.shape[3] % cfg.patch:
            raise ValueError(
                f"x is {tuple(x.shape)}; expected (B, {cfg.in_channels}, H, W) with H and W multiples of {cfg.patch}"
            )
        if context is None or cfg.context_dim is None:
            fits = context is None and cfg.context_dim is None
        else:
            fits = context.ndim == 3 and context.shape[::2] == (len(x), cfg.context_dim)
        if not fits:
            given, wanted = context if context is None else tuple(context.shape), f"({len(x)}, L, {cfg.context_dim})"
            raise ValueError(
                f"context is {given}; expected {wanted if cfg.context_dim else None}: the configuration's context_dim"
            )
        given, wanted = None if pooled is None else tuple(pooled.shape), cfg.pooled_dim and (len(x), cfg.pooled_dim)
        if given != wanted:
            raise ValueError(f"pooled is {given}; expected {wanted}: it goes with the configuration's pooled_dim")
