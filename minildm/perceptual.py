"""LPIPS: how different two pictures look, measured between the features of a network and not between their pixels.

The published distance looks through VGG16, 59 MB that only a download brings.  The same distance over a small network of the
same kind, trained on our own pictures, works offline; the numbers of the two must not be compared.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minildm.files import read_shipped, read_tensors

VGG_FILE = "https://download.pytorch.org/models/vgg16-397923af.pth"  # 528 MB, of which 59 are used
HEADS_FILE = "lpips/weights/v0.1/vgg.pth in the Python package lpips"  # 7 kB


class VGGFeatures(nn.Module):
    """The convolutions of VGG16, which answer with what they see at each resolution.  Simonyan & Zisserman 2015, table 1, D.

    Args:
        widths: channels of each resolution; between two the side halves.
        convs: convolutions at each resolution.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512), convs: tuple[int, ...] = (2, 2, 3, 3, 3)):
        super().__init__()
        layers, channels = [], 3
        for width, count in zip(widths, convs, strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU()]
                channels = width
                nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # what goes in comes out as strong
                nn.init.zeros_(layers[-2].bias)
        self.features = nn.Sequential(*layers)
        self.smallest = 2 ** (len(widths) - 1)  # side of the smallest picture, in pixels
        # from [-1, 1] to mean 0 and deviation 1 over ImageNet, which VGG16 was trained on
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    @classmethod
    def toy(cls) -> "VGGFeatures":
        """Three resolutions, 72,000 parameters: small enough to train in a minute, and for pictures of 32 pixels."""
        return cls(widths=(16, 32, 64), convs=(2, 2, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] to one map a resolution, (B, C, H, W), (B, C', H / 2, W / 2), ...

        Raises:
            ValueError: the pictures are smaller than one pixel of the last map.
        """
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(f"pictures of {x.shape[2]} x {x.shape[3]} pixels: these features need sides of {self.smallest}")
        h, maps = (x - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(h)
            h = layer(h)
        return [*maps, h]


class LPIPS(nn.Module):
    """Learned perceptual distance between two pictures.  Zhang et al. 2018, equation 1.

    At each position of each map the features are a vector; both vectors are cut to length one and subtracted, the squared
    difference is weighted by channel and averaged over the positions; the maps are added up.

    Args:
        features: pictures in [-1, 1] to a list of maps (B, C, H, W).  If it is a network, its weights are frozen.
        weights: how much each channel counts, one (C,) a map, none negative; None counts all alike.

    Raises:
        ValueError: a weight is negative.
    """

    def __init__(self, features: Callable[[Tensor], list[Tensor]], weights: list[Tensor] | None = None):
        super().__init__()
        if weights is not None and any((w < 0).any() for w in weights):
            raise ValueError(
                "a weight is negative, so that some change would bring two pictures closer; clamp the weights at 0"
            )
        self.features = features
        self.weights = None if weights is None else nn.ParameterList(weights)
        self.requires_grad_(False).eval()  # a ruler, not something to train

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """How different x and y look.

        Args:
            x: pictures, (B, 3, H, W) in [-1, 1].
            y: the pictures to compare them with, same shape; gradients flow to both.

        Returns:
            Distances, (B,), 0 where both are the same.

        Raises:
            ValueError: x and y differ in shape, or the features do not fit the weights.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two batches (B, 3, H, W) of one shape, and was given {tuple(x.shape)} and {tuple(y.shape)}"
            )
        fx, fy = self.features(x), self.features(y)
        weights = [torch.ones(f.shape[1], device=f.device) for f in fx] if self.weights is None else list(self.weights)
        if [len(w) for w in weights] != [f.shape[1] for f in fx]:
            raise ValueError(f"weights of {[len(w) for w in weights]} channels for features of {[f.shape[1] for f in fx]}")
        distance = torch.zeros(len(x), device=x.device)
        for a, b, w in zip(fx, fy, weights, strict=True):
            difference = (unit(a) - unit(b)).square()  # (B, C, H, W)
            distance = distance + torch.einsum("bchw, c -> bhw", difference, w).mean(dim=(1, 2))  # (B,)
        return distance


def unit(features: Tensor) -> Tensor:
    """Cuts the vector at each position to length one; (B, C, H, W).

    A vector of zeros stays one.  `vector_norm` has a gradient of zero there, where the root of a sum of squares has nan.
    """
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def load_features() -> tuple[VGGFeatures, dict[str, str]]:
    """The shipped small features, trained on emoji to tell one from another, and what their file says of them."""
    weights, about = read_shipped("features-emoji32.safetensors")
    features = VGGFeatures.toy()
    features.load_state_dict(weights)
    return features.eval(), about


def load_lpips(vgg_file: Path | str, heads_file: Path | str) -> LPIPS:
    """The published LPIPS, version 0.1 over VGG16, from two files that you have.

    Args:
        vgg_file: torchvision's VGG16, `vgg16-397923af.pth`.
        heads_file: the weights of the channels, `vgg.pth` of the Python package lpips.

    Raises:
        FileNotFoundError: one of them is missing; says where it comes from.
        ValueError: one of them holds something else.
    """
    features, widths = VGGFeatures(), (64, 128, 256, 512, 512)
    wanted = {name: tuple(p.shape) for name, p in features.named_parameters()}
    features.load_state_dict(read_tensors(Path(vgg_file), wanted, VGG_FILE))
    wanted = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}
    heads = read_tensors(Path(heads_file), wanted, HEADS_FILE)
    return LPIPS(features, [head.flatten() for head in heads.values()])
