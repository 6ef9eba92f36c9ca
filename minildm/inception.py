"""Inception v3, the network through which the published FID, KID and IS look at pictures.

Its weights are a download of 2015; whoever has the file gets the published scores, whoever has not has `minildm.metrics`'s toy
ones.
"""

import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.files import open_weights, read_tensors

INCEPTION_FILE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """Inception v3, the network that the published FID, KID and IS look through.  Szegedy et al. 2016, section 6.

    Those scores come from one set of weights of 2015, whose network differs from the paper's and from torchvision's: its
    average pooling leaves the padding out, its last block takes the maximum in place of the average, and there are 1,008
    classes.  Pictures are rounded to 8 bits, as if they had been saved, and enlarged in the way of TensorFlow 1.

    Args:
        published: that network; False is torchvision's, whose scores are no one else's.
    """

    def __init__(self, published: bool = True):
        super().__init__()
        from torchvision.models import inception_v3  # here, because it is slow and most runs do without

        self.published = published
        self.network = inception_v3(
            weights=None, num_classes=1008 if published else 1000, aux_logits=False, init_weights=False, transform_input=False
        )
        self.classifier, self.network.fc = self.network.fc, nn.Identity()
        if published:
            mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
            for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
                _pool_by(mean, self.network.get_submodule(f"Mixed_{name}"))
            _pool_by(partial(F.max_pool2d, kernel_size=3, stride=1, padding=1), self.network.Mixed_7c)
        self.requires_grad_(False).eval()  # a ruler, not something to train

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of any size, in [-1, 1] and clamped to it, to features (B, 2048).

        Raises:
            ValueError: other shapes, or whole numbers, which are not in [-1, 1].
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"Inception reads floats (B, 3, H, W) in [-1, 1], not {images.dtype} {tuple(images.shape)}")
        if not self.published:
            return self.network(F.interpolate(images.clamp(-1, 1), size=(299, 299), mode="bilinear", antialias=True))
        levels = (127.5 * images + 127.5).round().clamp(0, 255)
        return self.network((enlarge_as_tensorflow(levels, size=299) - 128) / 128)

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, 2048) to the logits that the inception score takes, (B, 1008); the published code adds no bias."""
        return F.linear(features, self.classifier.weight, None if self.published else self.classifier.bias)


def _pool_by(pool: partial, block: nn.Module) -> None:
    """Has the last branch of one of torchvision's Inception blocks, which pools first, pool in another way."""

    def replaced(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        branch = block.branch_pool(pool(inputs[0]))
        return torch.cat([output[:, : -branch.shape[1]], branch], dim=1)

    block.register_forward_hook(replaced)


def enlarge_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size) between the two nearest pixels, counted from corners and not from centres of pixels.

    Pictures move up and left by half a pixel less than one would expect, and shrink without smoothing: a mistake of
    TensorFlow 1 that the published scores contain.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = place.long()
        share = (place - low).view([-1 if d == dim else 1 for d in range(4)])
        before, after = (images.index_select(dim, i) for i in (low, (low + 1).clamp(max=length - 1)))
        images = before + (after - before) * share
    return images


def load_inception(path: Path | str) -> Inception:
    """Inception v3 from a file that you have; nothing is downloaded.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torch-fidelity's `weights-inception-2015-12-05-...`,
            for the published scores.  Torchvision's `inception_v3_google-0cc3c7bd.pth` is read too, with a warning.

    Raises:
        FileNotFoundError: there is none; says where it comes from.
        ValueError: it holds something else.
    """
    path = Path(path)
    bias = open_weights(path, INCEPTION_FILE).get("fc.bias")
    inception = Inception(published=bias is None or bias.shape != (1000,))
    state = {
        name.replace("network.", "").replace("classifier.", "fc."): t
        for name, t in inception.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for name, t in read_tensors(path, {name: tuple(t.shape) for name, t in state.items()}, INCEPTION_FILE).items():
        state[name].copy_(t)  # into the network
    if not inception.published:
        warnings.warn(
            f"{path} is torchvision's classifier: scores over it are not the published FID, KID and IS, and must not be "
            f"compared with them; those need {INCEPTION_FILE}",
            stacklevel=2,
        )
    return inception
