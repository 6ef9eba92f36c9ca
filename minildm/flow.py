"""Flow matching: the straight path from a picture to noise, and the sampler that walks it back.

Time runs from 0, the picture, to 1, noise, and the network is asked for the speed of the walk, which on a straight path is
the same all the way: noise - x0.  Lipman et al. 2023; Liu et al. 2023; Esser et al. 2024 (Stable Diffusion 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowPath:
    """The straight path x_t = (1 - t) x0 + t noise, its times counted from 0 to 1000 as the networks here count them.

    Args:
        shift: how far times are moved towards noise, above 0; 1 leaves them.  Larger pictures need more noise to hide as
            much: Stable Diffusion 3 samples with 3.  Esser et al. 2024, equation 23.
        mean: of the normal distribution from whose sigmoid training times are drawn.  Equation 19 there.
        std: its standard deviation, above 0.

    Raises:
        ValueError: shift or std is not above 0.
    """

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and self.std > 0):
            raise ValueError(f"shift is {self.shift} and std {self.std}; both must be above 0")

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times, (count,) float32 in (0, 1000): logit-normal, so that the hard middle of the path comes often."""
        return self._shifted(torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))) * 1000

    def times(self, steps: int) -> list[float]:
        """Times that a sampler visits, noisiest first, in (0, 1000]: evenly spaced from 1000, then shifted.

        Raises:
            ValueError: steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [1000 * self._shifted(i / steps) for i in range(steps, 0, -1)]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Walks from x0 straight towards the noise.

        Args:
            x0: clean latents, (B, C, H, W).
            noise: standard normal, same shape as x0.
            t: times, (B,) or one for all, in [0, 1000].

        Raises:
            ValueError: t is outside [0, 1000] or not one for each sample, or noise and x0 differ in shape; says which.
        """
        s = self._share(x0, noise, t)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float, prediction_type: str = "flow") -> Tensor:
        """What the network is asked for: the path's speed, noise - x0, whatever the time.

        Raises:
            ValueError: prediction_type is not "flow"; or as add_noise.
        """
        if prediction_type != "flow":
            raise ValueError(f'on a straight path the network predicts "flow", the speed, not {prediction_type!r}')
        self._share(x0, noise, t)
        return noise - x0

    def to_x0(self, pred: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The clean latents that a predicted speed implies, x - t pred.  Args and Raises: as add_noise."""
        return x - self._share(x, pred, t) * pred

    def _shifted(self, s: Tensor | float) -> Tensor | float:
        return self.shift * s / (self.shift * s + (1 - s))  # equation 23, written so that 1 stays 1 to the bit

    def _share(self, x: Tensor, other: Tensor, t: Tensor | float) -> Tensor:
        """The share of noise at time t, ready to multiply x."""
        if x.shape != other.shape:
            raise ValueError(f"the two tensors must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
        s = torch.as_tensor(t.cpu() if isinstance(t, Tensor) else t, dtype=torch.float64) / 1000
        if s.ndim and s.shape != x.shape[:1]:
            raise ValueError(f"t must be one number or one for each of the {len(x)} samples, got shape {tuple(s.shape)}")
        if s.numel() and not (s.min() >= 0 and s.max() <= 1):
            raise ValueError(f"t must lie in [0, 1000], got values from {1000 * s.min():g} to {1000 * s.max():g}")
        return s.view(-1, *[1] * (x.ndim - 1)).to(x)  # (B,) -> (B, 1, 1, 1)


@torch.no_grad()
def flow_euler(
    model: Model,
    x: Tensor,
    path: FlowPath,
    steps: int = 50,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample by walking against the predicted speed in straight lines, from noise to a picture.  Esser et al. 2024.

    Args:
        model: called as model(x, t) with x (B, C, H, W) and t (B,) float32 in (0, 1000]; returns the speed, shaped as x.
        x: starting noise, standard normal, (B, C, H, W).
        path: the path that the model was trained on; another `shift` may be used.
        steps: how many times the model is asked, at least 1.
        callback: called after each step as callback(i, t, x, x0): the step, counted from 0; the time asked about; the latents
            now; the clean latents as the model sees them.

    Returns:
        Clean latents, (B, C, H, W), in x's dtype and on its device.

    Raises:
        ValueError: steps is below 1, or the model's output is not shaped as x.
        FloatingPointError: the model's output holds a NaN or an infinity; says at which step.
    """
    times = path.times(steps)
    for i, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        speed = model(x, torch.full((len(x),), t, device=x.device))
        if speed.shape != x.shape:
            raise ValueError(f"the model must return the shape of its input, {tuple(x.shape)}, got {tuple(speed.shape)}")
        if not speed.isfinite().all():
            raise FloatingPointError(f"the model's output holds NaN or Inf at step {i}, time {t:.0f}; check its weights")
        speed = speed.to(x.dtype)
        x0 = path.to_x0(speed, x, t)
        x = x + (t_next - t) / 1000 * speed
        if callback:
            callback(i, t, x, x0)
    return x
