"""Large pictures in small pieces: decoding latents a few at a time, or tile by tile."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def decode_sparingly(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Decodes small latents 64 at a time, large ones singly, and those of more than 160 x 160 in tiles.

    Args:
        decode: latents (B, C, h, w) to pictures (B, 3, f h, f w).
        z: latents, N of them.

    Raises:
        FloatingPointError: a picture holds NaN or Inf.
    """
    area = z.shape[2] * z.shape[3]
    if area > 160 * 160:
        pictures = torch.cat([decode_tiled(decode, one) for one in z.split(1)])
    else:
        pictures = torch.cat([decode(some) for some in z.split(1 if area > 32 * 32 else 64)])
    if not pictures.isfinite().all():
        raise FloatingPointError(f"the decoded picture holds NaN or Inf; in {z.dtype} it may have overflowed: try float32")
    return pictures


def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int = 96, overlap: int = 24) -> Tensor:
    """Decodes latents in tiles, each fading into the next, so that memory does not grow with the picture.

    Norms and attention see one tile at a time, so the picture differs a little from one decoded whole.

    Args:
        decode: latents (B, C, h, w) to pictures (B, 3, f h, f w).
        z: latents.
        tile: side of a tile, in latents.
        overlap: how many of them neighbours share, in [1, tile / 2].

    Returns:
        (B, 3, f h, f w) float32.
    """
    total = weights = None
    for top, left in product(*(_starts(side, tile, tile - overlap) for side in z.shape[2:])):
        part = decode(z[:, :, top : top + tile, left : left + tile]).float()  # sums would overflow in half precision
        f = part.shape[2] // min(tile, z.shape[2])
        if total is None:
            total = part.new_zeros(*part.shape[:2], f * z.shape[2], f * z.shape[3])
            weights = part.new_zeros(total.shape[2:])
        fades = [
            (torch.arange(n) + 0.5).minimum(n - torch.arange(n) - 0.5).clamp(max=f * overlap) / (f * overlap)
            for n in part.shape[2:]
        ]
        fade = torch.outer(*fades).to(part)
        window = slice(f * top, f * top + part.shape[2]), slice(f * left, f * left + part.shape[3])
        total[:, :, *window] += part * fade
        weights[*window] += fade
    return total / weights


def _starts(side: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin that cover a side; the last is moved back to end with it."""
    return [*range(0, side - tile, stride), max(0, side - tile)]
