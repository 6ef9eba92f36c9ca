"""Vector quantisation: a latent that is a grid of whole numbers, each the index of a vector in a learned codebook.

Where the Kullback-Leibler term of a variational autoencoder keeps latents orderly by adding noise, a codebook does it by
rounding.  Two things then need care: a gradient must get through the rounding, and codes that nobody uses must be found again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.vae import Decoder, Encoder, VAEConfig


class Quantized(NamedTuple):
    """What the quantiser says of a batch."""

    z: Tensor  # (B, D, h, w): the codes' vectors, with the gradient of what was rounded to them
    codes: Tensor  # (B, h, w) int64: which codes
    loss: Tensor  # scalar: commitment, and the codebook's own loss where gradients train it
    perplexity: Tensor  # scalar: how many codes are in even use, in [1, K]


class VectorQuantizer(nn.Module):
    """Rounds each vector of a latent to the nearest of K learned ones.  Van den Oord et al. 2017, section 3.

    While it trains, each batch moves the codebook, as each batch moves the averages of a BatchNorm.

    Args:
        codes: K, how many vectors the codebook has.
        dim: D, their length: the channels of the latent.
        beta: weight of the commitment loss, which keeps the encoder near the codes it chose.
        ema: True moves each code to the running mean of the vectors that chose it, appendix A.1 of the paper; False leaves
            the codebook to the optimiser, through a loss of its own, equation 3.
        decay: how much of the running means and counts is kept from batch to batch.
        revive_below: a code that is chosen less often than this share of an even split is dead, and is moved to a vector
            of the batch; so is every code at first.  0 revives none.  Dhariwal et al. 2020, section 3.1 (Jukebox).

    Raises:
        ValueError: there are no codes, or decay or revive_below is no share.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        ema: bool = True,
        decay: float = 0.99,
        revive_below: float = 0.1,
    ):
        super().__init__()
        if codes < 1 or dim < 1:
            raise ValueError(f"a codebook of {codes} vectors of length {dim}; both must be at least 1")
        if not (0 <= decay < 1 and 0 <= revive_below < 1):
            raise ValueError(f"decay is {decay} and revive_below {revive_below}; both are shares in [0, 1)")
        self.beta, self.ema, self.decay, self.revive_below = beta, ema, decay, revive_below
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes), requires_grad=not ema)
        self.register_buffer("counts", torch.full((codes,), 0.0 if revive_below else 1.0))  # how often each was chosen
        self.register_buffer("sums", self.codebook.detach() * self.counts[:, None])  # of the vectors that chose it

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Rounds a latent, and learns from it while training.

        Args:
            z: what the encoder says, (B, D, h, w).
            generator: chooses the vectors that dead codes are moved to.

        Raises:
            ValueError: z has another number of channels or axes.
        """
        codes, dim = self.codebook.shape
        if z.ndim != 4 or z.shape[1] != dim:
            raise ValueError(f"this codebook rounds latents (B, {dim}, h, w), and was given {tuple(z.shape)}")
        vectors = rearrange(z, "b d h w -> (b h w) d").float()
        if self.training and self.revive_below:
            self.revive(vectors.detach(), generator)
        chosen = self.nearest(vectors)  # (B h w,)
        rounded = self.codebook[chosen]  # (B h w, D)
        loss = self.beta * F.mse_loss(vectors, rounded.detach())
        if not self.ema:
            loss = loss + F.mse_loss(rounded, vectors.detach())
        if self.training:
            self.follow(vectors.detach(), chosen)
        share = torch.bincount(chosen, minlength=codes) / len(chosen)
        perplexity = torch.special.entr(share).sum().exp()
        straight = rounded.detach() + (vectors - vectors.detach())  # the value of the one, the gradient of the other
        b, _, h, w = z.shape
        straight = rearrange(straight, "(b h w) d -> b d h w", b=b, h=h, w=w)
        return Quantized(straight, chosen.view(b, h, w), loss, perplexity)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """The index of the nearest code of each vector; (N, D) to (N,) int64.  Equation 1."""
        return torch.cdist(vectors, self.codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)

    @torch.no_grad()
    def follow(self, vectors: Tensor, chosen: Tensor, eps: float = 1e-5) -> None:
        """Counts how often each code was chosen, and moves it to the running mean of the vectors that chose it.  Appendix A.1.

        Args:
            vectors: (N, D).
            chosen: the code of each, (N,).
            eps: added to every count, so that none is zero (Laplace smoothing); their sum stays the same.
        """
        codes = len(self.codebook)
        self.counts.lerp_(torch.bincount(chosen, minlength=codes).float(), 1 - self.decay)
        if self.ema:
            self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, vectors), 1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + eps) / (total + codes * eps) * total
            self.codebook.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def revive(self, vectors: Tensor, generator: torch.Generator | None = None) -> int:
        """Moves every dead code to a vector of the batch, chosen at random, and says how many there were.

        Args:
            vectors: (N, D).
            generator: for the choice.
        """
        even = len(vectors) / len(self.codebook)
        (dead,) = torch.where(self.counts < self.revive_below * even)
        device = generator.device if generator else vectors.device
        order = torch.randperm(len(vectors), generator=generator, device=device).to(vectors.device)
        picks = order[torch.arange(len(dead), device=order.device) % len(order)]  # each vector once before any twice
        self.codebook[dead] = vectors[picks]
        self.sums[dead] = vectors[picks] * even
        self.counts[dead] = even
        return len(dead)


class VQAutoencoder(nn.Module):
    """The autoencoder of `minildm.vae` with a codebook in the place of its normal distribution.  Esser et al. 2021.

    The encoder's last convolution has two numbers for each of the latent's: for a normal distribution mean and log-variance.
    Here the 1x1 convolution after it mixes them into one, and its output is what gets rounded.

    Args:
        cfg: its shape; the codes are vectors of `cfg.latent_channels` numbers.
        codes: how many there are.
        ema: as in `VectorQuantizer`.
        revive_below: as in `VectorQuantizer`.
    """

    def __init__(self, cfg: VAEConfig, codes: int = 512, *, ema: bool = True, revive_below: float = 0.1):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, cfg.latent_channels, kernel_size=1)
        self.quantizer = VectorQuantizer(codes, cfg.latent_channels, ema=ema, revive_below=revive_below)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, kernel_size=1)
        self.decoder = Decoder(cfg)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Pictures (B, 3, H, W) in [-1, 1], with sides that are multiples of `cfg.downsampling`, to their rounded latents.

        Raises:
            ValueError: x has another shape, or its sides do not divide; says what would.
        """
        channels, f = self.cfg.in_channels, self.cfg.downsampling
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"encode takes pictures (B, {channels}, H, W), H and W multiples of {f}, and was given {tuple(x.shape)}"
            )
        return self.quantizer(self.quant_conv(self.encoder(x)), generator)

    def decode(self, z: Tensor) -> Tensor:
        """Rounded latents (B, D, h, w) to pictures (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) from nothing but whole numbers: codes (B, h, w) int64 in [0, K).

        Raises:
            ValueError: a code is not in the codebook.
        """
        k = len(self.quantizer.codebook)
        if codes.ndim != 3 or codes.min() < 0 or codes.max() >= k:
            raise ValueError(
                f"decode_codes takes (B, h, w) in [0, {k}), and was given {tuple(codes.shape)} up to {codes.max()}"
            )
        return self.decode(rearrange(self.quantizer.codebook[codes], "b h w d -> b d h w"))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Quantized]:
        """Pictures (B, 3, H, W) to their reconstructions, and what the quantiser said, with a loss of its own to be added."""
        quantized = self.encode(x, generator)
        return self.decode(quantized.z), quantized
