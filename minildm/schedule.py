"""The noise schedule: how much picture and how much noise there is at each timestep.

Everything here is arithmetic on one tensor, alpha_bar; no network, no sampler, no state.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A fixed sequence of signal levels, alpha_bar[t], from nearly 1 (clean) to nearly 0 (noise).  Ho et al. 2020, eq. 4.

    Args:
        alpha_bar: share of the variance that is still picture, (T,), float64 on the CPU, strictly decreasing, in [0, 1).

    Raises:
        ValueError: alpha_bar is anything else.
    """

    alpha_bar: Tensor

    def __post_init__(self) -> None:
        a = self.alpha_bar
        if a.ndim != 1 or len(a) == 0 or a.dtype != torch.float64 or a.device.type != "cpu":
            raise ValueError(
                f"alpha_bar must be (T,), float64, on the CPU, got {tuple(a.shape)}, {a.dtype}, on {a.device}; "
                "use alpha_bar.double().cpu()"
            )
        if not (a[0] < 1 and a[-1] >= 0 and (a[1:] < a[:-1]).all()):
            raise ValueError(
                f"alpha_bar must fall strictly within [0, 1), got {a[0].item():.6g} to {a[-1].item():.6g}; "
                "check that every beta lies in (0, 1)"
            )

    @classmethod
    def scaled_linear(cls, T: int = 1000, start: float = 0.00085, end: float = 0.012) -> "NoiseSchedule":
        """Betas whose square roots are evenly spaced: Stable Diffusion's schedule.  Rombach et al. 2022, released code.

        Args:
            T: number of timesteps, at least 1.
            start: first beta, in (0, 1).
            end: last beta, in (0, 1).
        """
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64, device="cpu") ** 2
        return cls(alpha_bar=(1 - betas).cumprod(0))

    @classmethod
    def linear(cls, T: int = 1000, start: float = 1e-4, end: float = 0.02) -> "NoiseSchedule":
        """Evenly spaced betas.  Ho et al. 2020, section 4.

        Args:
            T: number of timesteps, at least 1.
            start: first beta, in (0, 1).
            end: last beta, in (0, 1).
        """
        betas = torch.linspace(start, end, T, dtype=torch.float64, device="cpu")
        return cls(alpha_bar=(1 - betas).cumprod(0))

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008) -> "NoiseSchedule":
        """Signal that falls like a squared cosine, with no beta above 0.999.  Nichol & Dhariwal 2021, eq. 17.

        Args:
            T: number of timesteps, at least 1.
            s: offset that keeps the first betas from vanishing, above 0.
        """
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        return cls(alpha_bar=(1 - betas).cumprod(0))

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.alpha_bar)

    @property
    def betas(self) -> Tensor:
        """Variance of the noise that each single step adds, (T,), float64.  Ho et al. 2020, eq. 2."""
        previous = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        return 1 - self.alpha_bar / previous

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The same schedule, shifted and stretched so that the last step is pure noise.  Lin et al. 2023, algorithm 1."""
        root = self.alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return NoiseSchedule(alpha_bar=root**2)

    def snr(self, t: Tensor | int) -> Tensor:
        """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar), float64 on the CPU, shaped as t.  Kingma et al. 2021, eq. 2.

        Args:
            t: timesteps, (B,) or one integer, in [0, T).

        Raises:
            ValueError: t is outside [0, T) or not an integer.
        """
        a = self._alpha_bar_at(t)
        return a / (1 - a)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training timesteps, (count,) int64, each in [0, T) equally often.  Ho et al. 2020, algorithm 1."""
        return torch.randint(self.T, (count,), generator=generator)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Jump from x0 straight to timestep t.  Ho et al. 2020, eq. 4.

        Args:
            x0: clean latents, (B, C, H, W).
            noise: standard normal, same shape as x0.
            t: timesteps, (B,) or one integer for all, in [0, T).

        Raises:
            ValueError: t is outside [0, T) or not one for each sample, or noise and x0 differ in shape; says which.
        """
        alpha, sigma = self._levels(t, x0, noise)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a v-predicting network is asked for, alpha * noise - sigma * x0.  Salimans & Ho 2022, appendix D.

        Args and Raises: as add_noise.
        """
        alpha, sigma = self._levels(t, x0, noise)
        return alpha * noise - sigma * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int, prediction_type: str = "epsilon") -> Tensor:
        """What the network is asked to predict: the noise, the velocity or the clean latents.

        Args:
            x0: clean latents, (B, C, H, W).
            noise: what add_noise mixed in, same shape as x0.
            t: timesteps, (B,) or one integer for all, in [0, T).
            prediction_type: "epsilon", "v_prediction" or "sample".

        Raises:
            ValueError: as add_noise; or prediction_type is unknown.
        """
        check_prediction_type(prediction_type)
        return {"epsilon": noise, "v_prediction": self.velocity(x0, noise, t), "sample": x0}[prediction_type]

    def to_x0(self, pred: Tensor, x: Tensor, t: Tensor | int, prediction_type: str = "epsilon") -> Tensor:
        """The clean latents that a prediction implies.  Salimans & Ho 2022, section 4.

        Args:
            pred: the network's output, (B, C, H, W).
            x: its noisy input, same shape as pred.
            t: timesteps, (B,) or one integer for all, in [0, T).
            prediction_type: "epsilon", "v_prediction" or "sample".

        Raises:
            ValueError: as add_noise; prediction_type is unknown; or it is "epsilon" where alpha_bar is 0: pure noise says
                nothing of x0.
        """
        check_prediction_type(prediction_type)
        alpha, sigma = self._levels(t, x, pred)
        if prediction_type == "epsilon":
            if not alpha.all():
                raise ValueError(
                    'x0 is undefined for "epsilon" where alpha_bar is 0 (zero terminal SNR): the input is pure noise; '
                    'use a model trained with "v_prediction"'
                )
            return (x - sigma * pred) / alpha
        if prediction_type == "v_prediction":
            return alpha * x - sigma * pred
        return pred

    def to_epsilon(self, pred: Tensor, x: Tensor, t: Tensor | int, prediction_type: str = "epsilon") -> Tensor:
        """The noise that a prediction implies.  Salimans & Ho 2022, section 4.

        Args and Raises: as to_x0, but defined at alpha_bar = 0 too.
        """
        check_prediction_type(prediction_type)
        alpha, sigma = self._levels(t, x, pred)
        if prediction_type == "epsilon":
            return pred
        if prediction_type == "v_prediction":
            return alpha * pred + sigma * x
        return (x - alpha * pred) / sigma

    def min_snr_weight(self, t: Tensor | int, prediction_type: str = "epsilon", gamma: float = 5.0) -> Tensor:
        """Loss weight that keeps the easy, nearly clean timesteps from ruling the training.  Hang et al. 2023, section 3.4.

        Args:
            t: timesteps, (B,) or one integer, in [0, T).
            prediction_type: what the loss is measured in: "epsilon", "v_prediction" or "sample".
            gamma: the signal-to-noise ratio above which weights stop growing, above 0.

        Returns:
            Weights for a squared error, shaped as t and on its device, float32.

        Raises:
            ValueError: as snr; prediction_type is unknown; or gamma is not above 0.
        """
        check_prediction_type(prediction_type)
        if not gamma > 0:
            raise ValueError(f"gamma must be above 0, got {gamma}; the paper uses 5")
        snr = self.snr(t)
        capped = snr.clamp(max=gamma)
        # min(snr, gamma) / snr, written so that it is 1, not 0 / 0, where the SNR is zero
        weight = {"epsilon": (gamma / snr).clamp(max=1), "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]
        return weight.to(device=t.device if isinstance(t, Tensor) else "cpu", dtype=torch.float32)

    def timesteps(self, steps: int, spacing: str = "leading") -> list[int]:
        """Which timesteps a sampler visits, noisiest first.  Lin et al. 2023, table 2.

        Args:
            steps: how many, in [1, T].
            spacing: "leading" (multiples of T // steps, plus one: Stable Diffusion's; starts well below T - 1 when steps are
                few), "trailing" (starts at T - 1) or "linspace" (T - 1 to 0, rounded).

        Returns:
            `steps` integers in [0, T), descending.

        Raises:
            ValueError: steps is outside [1, T] or spacing is unknown.
        """
        T = self.T
        if not 1 <= steps <= T:
            raise ValueError(f"steps must lie in [1, {T}], got {steps}")
        if spacing == "leading":
            offset = 1 if steps < T else 0  # all T steps leave no room for it
            return [i * (T // steps) + offset for i in reversed(range(steps))]
        if spacing == "trailing":
            return [round(T * i / steps) - 1 for i in range(steps, 0, -1)]
        if spacing == "linspace":
            stride = (T - 1) / max(steps - 1, 1)
            return [round(i * stride) for i in reversed(range(steps))] if steps > 1 else [T - 1]
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")

    def _alpha_bar_at(self, t: Tensor | int) -> Tensor:
        t = torch.as_tensor(t, device="cpu")
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t must hold integers, got {t.dtype}; timesteps are counted from 0 to {self.T - 1}")
        if t.numel() and (t.min() < 0 or t.max() >= self.T):
            raise ValueError(f"t must lie in [0, {self.T}), got values from {t.min().item()} to {t.max().item()}")
        return self.alpha_bar[t.long()]

    def _levels(self, t: Tensor | int, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of picture and noise, sqrt(alpha_bar) and sqrt(1 - alpha_bar), ready to multiply x."""
        if x.shape != other.shape:
            raise ValueError(f"the two tensors must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
        a = self._alpha_bar_at(t)
        if a.ndim and a.shape != x.shape[:1]:
            raise ValueError(f"t must be one integer or one for each of the {len(x)} samples, got shape {tuple(a.shape)}")
        a = a.view(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, 1, 1)
        return a.sqrt().to(x), (1 - a).sqrt().to(x)


def check_prediction_type(prediction_type: str) -> None:
    """Raise a ValueError that lists the valid names, unless prediction_type is one."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
