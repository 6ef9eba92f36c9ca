"""Attention: every position looks at every other (self-attention), or at the words of the caption (cross-attention).

First the attention itself, then the two transformer blocks around it: the U-Net's, and the plainer one of CLIP.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Scaled dot-product attention with several heads.  Vaswani et al. 2017, equation 1; Rombach et al. 2022, section 3.3.

    Args:
        dim: features of the positions that ask, D.
        context_dim: features of the positions that answer; None for self-attention.
        heads: number of heads.
        dim_head: features of one head; heads * dim_head is often, but need not be, dim.
        bias: whether queries, keys and values have a bias.  The U-Net's have none, the autoencoder's and CLIP's do.
        causal: whether each position sees only itself and those before it, as in a text encoder.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        bias: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, heads * dim_head, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, D), and context (B, M, context_dim) or None to look at x itself; to (B, L, D)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # softmax(q k^T / sqrt(d)) v
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """A two-layer network at every position, its hidden layer gated: GEGLU, Shazeer 2020, equation 6.

    Args:
        dim: features in and out, D.
        mult: how many times wider the hidden layer is.
    """

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * mult * dim)
        self.out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each normalised first and added to what came in.

    Args:
        dim: features, D.
        context_dim: features of the caption's tokens.
        heads: number of heads; each is dim / heads wide.
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, heads=heads, dim_head=dim // heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads=heads, dim_head=dim // heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, L, D) and context (B, M, context_dim) to (B, L, D)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Lays an image out as a sequence of its pixels, runs transformer blocks over it, and folds it back.

    Args:
        channels: of the image, C; must be divisible by heads and by groups.
        context_dim: features of the caption's tokens.
        heads: number of heads.
        depth: number of transformer blocks.
        linear: whether the way in and out is a linear layer (Stable Diffusion 2, SDXL) or a 1x1 convolution (1.x): the same
            arithmetic, but other shapes of weight.
        groups: of the GroupNorm in front.

    Raises:
        ValueError: channels is not a multiple of heads.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int = 1, linear: bool = False, groups: int = 32):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} heads; choose a divisor of {channels}")
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, kernel_size=1)
        self.blocks = nn.ModuleList([BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W) and context (B, L, context_dim) to (B, C, H, W)."""
        height = x.shape[2]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.linear else self.proj_out(h)
        return x + h


class SpatialSelfAttention(nn.Module):
    """One head of self-attention over all pixels of an image: the middle of Stable Diffusion's autoencoder.

    Args:
        channels: of the image, C; must be divisible by groups.
        groups: of the GroupNorm in front.
    """

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.attn = CrossAttention(channels, heads=1, dim_head=channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attn(h), "b (h w) c -> b c h w", h=x.shape[2])


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid stand-in for GELU that OpenAI's CLIP was trained with, for any shape.  Hendrycks and Gimpel 2016, sec. 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Two linear maps with an activation between, for each token alone.

    Args:
        width: features of each token, D.
        hidden: features in the middle.
        activation: "gelu" or "quick_gelu".
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class PreNormBlock(nn.Module):
    """A transformer block with the norm before each branch, so that the residual stream runs through untouched.

    Args:
        width: features of each token, D.
        heads: number of attention heads; divides width.
        mlp_ratio: the MLP's middle is this many times the width.
        activation: "gelu" or "quick_gelu".
        causal: each token sees only itself and those before it (text), or all (pictures).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads=heads, dim_head=width // heads, bias=True, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width=width, hidden=mlp_ratio * width, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
