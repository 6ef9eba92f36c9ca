"""The adversary of the autoencoder: a network that tells real patches from decoded ones, and the losses of their game.

A squared error is lowest for the average of all pictures that could have been meant, and an average is blurred.  No patch of
a real picture looks like that, so a discriminator can see the blur, and the decoder learns to leave it out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One verdict for each overlapping patch of a picture: positive for real, negative for decoded.  Isola et al. 2017, 6.1.2.

    A plain stack of convolutions, with the layers and names of CompVis's.  Patches are 16, 34 or 70 pixels wide for one,
    two or three layers.

    Args:
        in_channels: of the pictures.
        width: channels of the first layer; each further one has twice as many, up to eight times this.
        layers: convolutions that halve the side; two more keep it, but for one pixel each.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        self.in_channels, self.smallest = in_channels, 3 * 2**layers
        main = [nn.Conv2d(in_channels, width, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            grown = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            main.append(nn.Conv2d(channels, grown, kernel_size=4, stride=stride, padding=1, bias=False))  # the norm has one
            main += [nn.BatchNorm2d(grown), nn.LeakyReLU(0.2)]
            channels = grown
        main.append(nn.Conv2d(channels, 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*main)
        self.main.apply(small_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), with h = H / 2^layers - 2.

        Raises:
            ValueError: x has another number of channels or axes, or is smaller than one verdict needs.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"this discriminator looks at pictures (B, {self.in_channels}, H, W) with sides of {self.smallest} pixels or "
                f"more, and was given {tuple(x.shape)}; for smaller ones take fewer layers"
            )
        return self.main(x)


def small_weights(layer: nn.Module) -> None:
    """Starts a layer as DCGANs are started: weights of deviation 0.02, scales about 1.  Radford et al. 2016, section 4."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, mean=0.0, std=0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, mean=1.0, std=0.02)
        nn.init.zeros_(layer.bias)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises: real above 1, decoded below -1, and nothing to gain beyond.  Lim & Ye 2017.

    Args:
        real_logits: verdicts on real pictures, any shape.
        fake_logits: verdicts on decoded ones, computed from *detached* pictures.

    Returns:
        A scalar; 1 for a discriminator that answers 0 to everything.
    """
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises: the verdict on its pictures, with the sign turned, a scalar.  Lim & Ye 2017."""
    return -fake_logits.mean()


def adaptive_weight(recon_loss: Tensor, gan_loss: Tensor, last_layer: Tensor, max: float = 1e4) -> Tensor:
    """The weight at which both losses pull equally hard at the decoder's last layer.  Esser et al. 2021, equation 7.

    Args:
        recon_loss: reconstruction with its perceptual part, a scalar.
        gan_loss: `generator_loss`, a scalar.
        last_layer: a weight that both depend on, such as `vae.decoder.conv_out.weight`.
        max: the most it can be.

    Returns:
        A scalar in [0, max] without gradient: multiply `gan_loss` by it, and by a constant, 0.5 in Stable Diffusion.
        What is added to the denominator is the published code's 1e-4; the paper has 1e-6.

    Raises:
        ValueError: last_layer takes no gradient, or a loss does not depend on it.
    """
    lengths = []
    for name, loss in (("recon_loss", recon_loss), ("gan_loss", gan_loss)):
        if not (loss.requires_grad and last_layer.requires_grad):
            raise ValueError(f"{name} and last_layer must both carry gradients; was one of them detached, or made in no_grad?")
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{name} does not depend on last_layer {tuple(last_layer.shape)}: take the decoder's last weight")
        lengths.append(gradient.norm())
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0.0, max)
