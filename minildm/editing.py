"""Editing: a picture goes in beside the caption, whole or with a hole to fill.

Image-to-image needs no code of its own: noise the picture part of the way (`NoiseSchedule.add_noise`) and let a sampler start
there (`skip`).  Inpainting is one more `model(x, t)`, so every sampler takes it as it is.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.schedule import NoiseSchedule


def skipped(steps: int, strength: float) -> int:
    """How many of a sampler's steps image-to-image leaves out, rounded as the reference does.  Meng et al. 2022 (SDEdit).

    Args:
        steps: of the sampler, at least 1.
        strength: share of the steps that are taken, in [0, 1]: 1 forgets the picture; less than 1 / steps changes nothing.

    Returns:
        A number in [0, steps]: the sampler's `skip`; `steps` means that nothing is to be sampled.

    Raises:
        ValueError: strength is outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; expected a share of the steps, from 0 (keeps all) to 1 (keeps nothing)")
    return steps - int(steps * strength)


def latent_mask(mask: Tensor, downsampling: int) -> Tensor:
    """A mask of pixels as one of latents: a position is repainted as soon as one of its pixels is to be.

    That is the side to err on: what is to go must not shine through from the rim.  The reference looks at one pixel of each
    position instead, the top left one; where the mask's edges lie between positions, both agree.

    Args:
        mask: (N, 1, H, W) in [0, 1]: 1 repaint, 0 keep, and a blend of both between them.
        downsampling: pixels a latent position along each side; it divides H and W.

    Returns:
        (N, 1, h, w) in [0, 1].

    Raises:
        ValueError: the shape or a value is another; says which.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] % downsampling or mask.shape[3] % downsampling:
        raise ValueError(f"mask is {tuple(mask.shape)}; expected (N, 1, H, W) with H and W multiples of {downsampling}")
    low, high = mask.min().item(), mask.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"mask ranges from {low:.3g} to {high:.3g}; expected 1 to repaint, 0 to keep: divide bytes by 255")
    return F.max_pool2d(mask.float(), downsampling)


def keep(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    known: Tensor,
    mask: Tensor,
    prediction_type: str = "epsilon",
) -> Callable[[Tensor, Tensor], Tensor]:
    """Inpainting with any model: where the mask is 0 the answer is no guess, for the clean latents are known.

    There the prediction is the one that implies `known` (Wang et al. 2023, DDNM, do so for any degradation).  All samplers go
    where the predicted x0 is, so all arrive at it; on the way x is `known` with the right amount of noise.  Those who blend it
    into x after each step (Lugmayr et al. 2022, RePaint, eq. 8; Avrahami et al. 2023) reach the same, sampler by sampler.

    Args:
        model: called as model(x, t), with x (B, C, H, W).
        schedule: the schedule that the model was trained with.
        known: clean latents, (B or 1, C, H, W).
        mask: (B or 1, 1, H, W) in [0, 1]: 1 leaves the model's answer, 0 puts the known one in its place, else both are mixed.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample".

    Returns:
        A function of x (B, C, H, W) and t (B,) that predicts what the model predicts.

    Raises:
        ValueError: when called, if known or mask does not fit x; says which.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        x0, m = _for_each(x, known, x.shape[1], "known"), _for_each(x, mask, 1, "mask")
        noise = schedule.to_epsilon(x0, x, t, "sample")  # what x holds beside the known picture
        return m * model(x, t) + (1 - m) * schedule.target(x0, noise, t, prediction_type)

    return predict


def with_mask(unet: Callable[..., Tensor], mask: Tensor, masked: Tensor) -> Callable[..., Tensor]:
    """An inpainting U-Net as one of text alone: it sees mask and masked picture beside x.  Rombach et al. 2022, section 4.5.

    Args:
        unet: called as unet(x, t, **condition), with 2C + 1 channels in and C out.
        mask: (N or 1, 1, H, W): 1 where it repaints, 0 where it keeps.
        masked: latents of the picture, blanked where it repaints, (N or 1, C, H, W).

    Returns:
        A function of x (B, C, H, W), t (B,) and the condition; B is N, or a multiple of it: guidance asks twice.

    Raises:
        ValueError: when called, if mask or masked does not fit x; says which.
    """

    def predict(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        beside = _for_each(x, mask, 1, "mask"), _for_each(x, masked, x.shape[1], "masked")
        return unet(torch.cat([x, *beside], dim=1), t, **condition)  # (B, C + 1 + C, H, W)

    return predict


def _for_each(x: Tensor, tensor: Tensor, channels: int, name: str) -> Tensor:
    """The tensor as often as x has samples for it, after checking that it fits x."""
    if tensor.ndim != 4 or tensor.shape[1:] != (channels, *x.shape[2:]) or len(x) % len(tensor):
        expected = f"({len(x)} or 1, {channels}, {x.shape[2]}, {x.shape[3]})"
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {expected}, to fit x, {tuple(x.shape)}")
    return tensor.to(x).repeat(len(x) // len(tensor), 1, 1, 1)
