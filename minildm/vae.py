"""The autoencoder of Stable Diffusion: pictures to latents, 48 times fewer numbers, and back.  Rombach et al. 2022, sec. 3.1.

It is a variational autoencoder whose Kullback-Leibler weight is so small that it is nearly an ordinary one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.attention import SpatialSelfAttention
from minildm.blocks import Downsample, ResBlock, Upsample


@dataclass(frozen=True)
class VAEConfig:
    """Everything that shapes an autoencoder."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level; between two levels the side halves
    blocks: int = 2  # ResBlocks a level on the way down; one more on the way up
    in_channels: int = 3
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    mid_attention: bool = True
    patch: int = 1  # space-to-depth before the first convolution and after the last
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents, measured; the diffusion sees latents times this

    @property
    def downsampling(self) -> int:
        """How many pixels of a side become one of the latent's."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @classmethod
    def sd15(cls) -> "VAEConfig":
        """Stable Diffusion 1 and 2: 512 x 512 x 3 to 64 x 64 x 4, 83,653,863 parameters."""
        return cls()

    @classmethod
    def sdxl(cls) -> "VAEConfig":
        """SDXL: the same network, other weights."""
        return cls(scaling_factor=0.13025)

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """64 x 64 x 3 to 8 x 8 x 4, the same 48 times, small enough to train on a laptop."""
        return cls(widths=(96, 128), blocks=1, groups=8, mid_attention=False, patch=4, scaling_factor=1.0)

    @classmethod
    def mini(cls) -> "VAEConfig":
        """32 x 32 x 3 to 8 x 8 x 4, for a demonstration in minutes."""
        return cls(widths=(96,), blocks=1, groups=8, mid_attention=False, patch=4, scaling_factor=1.0)


class DiagonalGaussian:
    """The encoder's answer: not one latent but a normal distribution of them, each number independent.

    Args:
        moments: mean and log-variance, (B, 2 C, H, W).
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, C, H, W)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, H, W)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws a latent (B, C, H, W), differentiable in mean and deviation.  Kingma & Welling 2014, section 2.4."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The likeliest latent: the mean, (B, C, H, W)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats, summed over each latent, (B,).  Kingma & Welling 2014, app. B."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class VAELevel(nn.Module):
    """ResBlocks at one resolution, and a change of resolution after them, or none."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.res = nn.ModuleList(blocks)
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        for block in self.res:
            x = block(x)
        return self.resample(x)


class VAEMiddle(nn.Module):
    """The bottom of the autoencoder: ResBlock, attention over all positions (or not), ResBlock."""

    def __init__(self, channels: int, cfg: VAEConfig):
        super().__init__()
        self.res1 = ResBlock(channels, channels, groups=cfg.groups, eps=1e-6)
        self.attn = SpatialSelfAttention(channels, cfg.groups) if cfg.mid_attention else nn.Identity()
        self.res2 = ResBlock(channels, channels, groups=cfg.groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return self.res2(self.attn(self.res1(x)))


class Encoder(nn.Module):
    """Pictures to the moments of their latents."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch = cfg.patch
        self.conv_in = nn.Conv2d(cfg.in_channels * cfg.patch**2, cfg.widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        channels = cfg.widths[0]
        for i, width in enumerate(cfg.widths):
            ins = [channels] + [width] * (cfg.blocks - 1)
            blocks = [ResBlock(c, width, groups=cfg.groups, eps=1e-6) for c in ins]
            last = i == len(cfg.widths) - 1
            self.down.append(VAELevel(blocks, None if last else Downsample(width, pad_evenly=False)))
            channels = width
        self.mid = VAEMiddle(channels, cfg)
        self.norm_out = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * cfg.latent_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 2 C, H / f, W / f)."""
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to pictures: the encoder walked backwards, with one more ResBlock a level."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch = cfg.patch
        channels = cfg.widths[-1]
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels, kernel_size=3, padding=1)
        self.mid = VAEMiddle(channels, cfg)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(cfg.widths))):
            ins = [channels] + [width] * cfg.blocks
            blocks = [ResBlock(c, width, groups=cfg.groups, eps=1e-6) for c in ins]
            self.up.append(VAELevel(blocks, Upsample(width) if i else None))
            channels = width
        self.norm_out = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, cfg.in_channels * cfg.patch**2, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, f h, f w)."""
        h = self.mid(self.conv_in(z))
        for level in self.up:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


class AutoencoderKL(nn.Module):
    """Encoder and decoder, with the two 1x1 convolutions that Stable Diffusion puts around the latent.

    Args:
        cfg: its shape; `VAEConfig.sd15()` loads the published weights, `VAEConfig.tiny()` trains in minutes.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, kernel_size=1)
        self.decoder = Decoder(cfg)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Pictures to the distribution of their latents.

        Args:
            x: (B, 3, H, W) in [-1, 1], H and W multiples of `cfg.downsampling`.

        Raises:
            ValueError: x has another shape, or its sides do not divide; says what would.
        """
        if x.ndim != 4 or x.shape[1] != self.cfg.in_channels:
            raise ValueError(f"encode takes pictures (B, {self.cfg.in_channels}, H, W), and was given {tuple(x.shape)}")
        f = self.cfg.downsampling
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"pictures of {x.shape[2]} x {x.shape[3]} pixels: both sides must be multiples of {f}; crop or resize"
            )
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), *not* multiplied by the scaling factor, to pictures (B, 3, H, W), about in [-1, 1].

        Raises:
            ValueError: z has another number of channels or axes.
        """
        if z.ndim != 4 or z.shape[1] != self.cfg.latent_channels:
            raise ValueError(f"decode takes latents (B, {self.cfg.latent_channels}, h, w), and was given {tuple(z.shape)}")
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Pictures (B, 3, H, W) to their reconstructions from a sampled latent, and the distribution it came from."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior


def vae_loss(
    x: Tensor,
    recon: Tensor,
    posterior: DiagonalGaussian,
    *,
    recon_norm: str = "l2",
    kl_weight: float = 1e-6,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    adversarial: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The four-part loss of Rombach et al. 2022, appendix G; each part can be left out.

    Args:
        x: pictures (B, 3, H, W) in [-1, 1].
        recon: their reconstructions, same shape.
        posterior: what the encoder said.
        recon_norm: "l2", the mean squared error; or "l1", the mean absolute one, which is what the paper has.  On pictures
            that are mostly one colour "l1" first learns that colour alone, the median, and stays there for long.
        kl_weight: weight of the KL term; 0 leaves it out.  The weight counts against *summed* terms (every pixel of the
            reconstruction, every number of the latent), as in the released configurations.
        perceptual: LPIPS or another distance, (x, recon) to (B, ...); None leaves it out.
        perceptual_weight: weight of that distance, beside a reconstruction error a pixel value.
        adversarial: a discriminator's term, a scalar, already weighted; None leaves it out.

    Returns:
        The loss a pixel value (a scalar), and its parts by name for logging.

    Raises:
        ValueError: recon_norm is unknown.
    """
    if recon_norm not in ("l1", "l2"):
        raise ValueError(f"recon_norm is {recon_norm!r}; choose l1 or l2")
    parts = {"recon": (x - recon).abs().mean() if recon_norm == "l1" else (x - recon).square().mean()}
    loss = parts["recon"]
    if kl_weight:
        parts["kl"] = posterior.kl().mean()  # a picture
        loss = loss + kl_weight * parts["kl"] / x[0].numel()  # both a pixel value
    if perceptual is not None:
        parts["perceptual"] = perceptual(x, recon).mean()
        loss = loss + perceptual_weight * parts["perceptual"]
    if adversarial is not None:
        parts["adversarial"] = adversarial
        loss = loss + adversarial
    return loss, parts
