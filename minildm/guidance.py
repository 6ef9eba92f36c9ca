"""Classifier-free guidance: ask the model with and without the prompt, and go further the way the prompt points.

The result is again a `model(x, t)`, so every sampler takes it as it is.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Condition = Tensor | Mapping[str, Tensor]


def guided(
    model: Callable[..., Tensor],
    cond: Condition,
    uncond: Condition,
    scale: float = 7.5,
    rescale: float = 0.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind a prompt and its opposite to a model, as one batched call.  Ho & Salimans 2022, eq. 6, with scale = 1 + their w.

    Args:
        model: called as model(x, t, **condition), with x (N, C, H, W) and t (N,); N is twice the sampler's batch.
        cond: what the prompt says: tensors by keyword, such as {"context": (B, L, D), "pooled": (B, D)}; a bare tensor means
            {"context": tensor}.  A batch of 1 serves every sample.
        uncond: the same for the empty prompt, or for a negative prompt: the picture moves away from it.
        scale: 0 ignores the prompt, 1 is the model without guidance (and costs half), above 1 obeys it more than the data do.
        rescale: share, in [0, 1], of the prediction that gets back the standard deviation of the conditional one, against
            overexposure.  Lin et al. 2023, eqs. 14 to 16; they use 0.7.

    Returns:
        A function of x (B, C, H, W) and t (B,) that predicts what the model predicts.

    Raises:
        ValueError: rescale is outside [0, 1]; cond and uncond differ in keywords or in shape after the batch; or, when called,
            their batch is neither 1 nor x's.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}; 0 turns it off, 0.7 is usual")
    cond = {"context": cond} if isinstance(cond, Tensor) else cond
    uncond = {"context": uncond} if isinstance(uncond, Tensor) else uncond
    _check_alike(cond, uncond)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond_b = {name: _to_batch(tensor, len(x), name) for name, tensor in cond.items()}
        if scale == 1:
            return model(x, t, **cond_b)
        both = {name: torch.cat([_to_batch(uncond[name], len(x), name), tensor]) for name, tensor in cond_b.items()}
        without, given = model(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)  # (2B, C, H, W) -> 2 x (B, C, H, W)
        prediction = without + scale * (given - without)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = given.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
            prediction = rescale * (prediction * ratio) + (1 - rescale) * prediction
        return prediction

    return predict


def _check_alike(cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor]) -> None:
    """Two conditions that share a batch need the same keywords and, apart from the batch, the same shapes."""
    if cond.keys() != uncond.keys():
        raise ValueError(f"cond and uncond must have the same keywords, got {sorted(cond)} and {sorted(uncond)}")
    for name in cond:
        given, without = tuple(cond[name].shape), tuple(uncond[name].shape)
        if given[1:] != without[1:]:
            raise ValueError(
                f"cond and uncond share one call, so {name!r} must have one shape after the batch, got {given} and {without}; "
                "pad both prompts to the same number of tokens"
            )


def _to_batch(tensor: Tensor, batch: int, name: str) -> Tensor:
    """Give each sample its condition: as it is, or one for all."""
    if len(tensor) not in (1, batch):
        raise ValueError(f"{name!r} must have a batch of 1 or {batch}, as x has, got {len(tensor)}")
    return tensor.expand(batch, *tensor.shape[1:])
