"""Latents: pictures encoded once and kept, in memory or in a file, for a diffusion that never sees a pixel."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minildm.checkpoint import write_atomically
from minildm.files import open_weights


class Dataset(Protocol):
    """What training asks of a dataset: its length, and pictures (N, 3, size, size) in [-1, 1] with their captions by number."""

    name: str
    size: int

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> tuple[Tensor, list[str]]: ...


@dataclass(frozen=True)
class Latents:
    """Pictures encoded once and kept: the diffusion never sees a pixel."""

    mean: Tensor  # (N, C, h, w)
    std: Tensor  # (N, C, h, w)
    captions: list[str]
    scaling_factor: float  # 1 / standard deviation of the latents

    def sample(self, picks: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents drawn from the encoder's distributions of these pictures, (len(picks), C, h, w)."""
        mean, std = self.mean[picks], self.std[picks]
        return (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling_factor

    def save(self, path: Path) -> None:
        """Writes them to one safetensors file, captions and all.

        Raises:
            OSError: the file cannot be written.
        """
        about = {"captions": json.dumps(self.captions), "scaling_factor": repr(self.scaling_factor)}
        tensors = {"mean": self.mean.contiguous(), "std": self.std.contiguous()}
        write_atomically(Path(path), lambda beside: save_file(tensors, beside, metadata=about))

    @classmethod
    def load(cls, path: Path) -> "Latents":
        """Opens what `save` wrote.  The file is mapped, not read: a latent comes off the disk when it is drawn.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else than latents.
        """
        path = Path(path)
        stored = open_weights(path, "Latents.save")
        try:
            with safe_open(path, framework="pt") as f:
                about = f.metadata() or {}
            captions, scaling_factor = json.loads(about["captions"]), float(about["scaling_factor"])
            shapes = {stored["mean"].shape, stored["std"].shape, (len(captions), *stored["mean"].shape[1:])}
            if len(shapes) != 1:
                raise ValueError(f"{len(captions)} captions, means {stored['mean'].shape}, deviations {stored['std'].shape}")
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no latents ({error}); it should come from Latents.save") from error
        return cls(stored["mean"].read(), stored["std"].read(), captions, scaling_factor)
