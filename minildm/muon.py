"""Muon: the step of a weight matrix, made equally long in all its directions.

The gradient of a matrix points mostly along a few directions, and Adam, which looks at one number at a time, follows them.
Muon takes the orthogonal matrix nearest to the step in its place, so that the rare directions are learned as fast as the loud
ones.  What that is worth at the sizes of this course stands in `tests/benchmarks/README.md`.  Jordan et al. 2024, "Muon".
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_LEFT_OUT = ("conv_in", "conv_out", "embedding")  # in our networks: what reads the data, what writes the answer, tables


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings the singular values towards 1 and leaves the singular vectors, by matrix products alone.

    Args:
        matrices: (K, M, N).
        iterations: of Newton-Schulz's kind; each is an odd polynomial of degree five in every singular value.  Its coefficients
            climb fast and then stay about 1, between 0.7 and 1.2; very small values have not arrived after five.

    Returns:
        (K, M, N).
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # Frobenius: no singular value is above 1
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # -4.7750 gram + 2.0315 gram^2
        x = torch.baddbmm(x, inner, x, beta=3.4445)  # 3.4445 x + inner x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for matrices and filters, flattened; AdamW for all of one dimension, such as biases and norms.

    AdamW also keeps what has "conv_in", "conv_out" or "embedding" in its name.  Of our networks' first and last layers that is
    most; a projection at the end, or an autoencoder's 1x1 convolution, goes by Muon.

    Args:
        parameters: what to train, by name, in the order in which a checkpoint keeps them.
        matrix_lr: Muon's learning rate: about how far a step goes in each direction of a matrix.  A schedule that scales `lr`
            scales it alike.
        lr: AdamW's, above 0.
        momentum: decay of the running mean of the gradients.
        betas, weight_decay: AdamW's; the matrices do not decay.

    Matrices that are spread over several processes (FSDP) are put together for the moment of their step.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], matrix_lr: float, *, lr: float, momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(parameters.values(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.momentum, self.times_lr = momentum, matrix_lr / lr
        self.by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}  # matrices of one shape go through together
        for name, p in parameters.items():
            if p.ndim >= 2 and not any(word in name for word in _LEFT_OUT):
                self.by_shape.setdefault((len(p), p.numel() // len(p)), []).append(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step for every parameter that has a gradient; those of the matrices are used up."""
        for (rows, columns), parameters in self.by_shape.items():
            moving = [p for p in parameters if p.grad is not None]
            if not moving:
                continue
            for p in moving:
                if "momentum" not in self.state[p]:
                    self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # AdamW will not load it without
            means, grads = [self.state[p]["momentum"] for p in moving], [p.grad for p in moving]
            torch._foreach_lerp_(means, grads, 1 - self.momentum)
            torch._foreach_lerp_(grads, means, self.momentum)  # Nesterov's: where the mean will be
            steps = orthogonalize(torch.stack([_whole(g).flatten(1) for g in grads]))  # (K, rows, columns)
            size = self.param_groups[0]["lr"] * self.times_lr * max(1, rows / columns) ** 0.5
            for p, step in zip(moving, size * steps, strict=True):
                p.sub_(_as_spread(step.view(p.shape), p))
            for p in moving:
                p.grad = None
        super().step()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _as_spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Spread over the processes as `like` is: each keeps its own part of what all of them have computed."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # here, because it is slow to import

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
