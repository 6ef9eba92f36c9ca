"""Measuring a heap of pictures: how far generated pictures, taken together, are from real ones.

Every score here is arithmetic on features, one row a picture, and knows nothing of the network that they come from.  So a
score means nothing without the name of its network and the number of its pictures; compare only what agrees in both.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Extractor = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) to features (B, D)


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch and need not be kept.  Chan, Golub & LeVeque 1979.

    What is kept is the mean and the sum of squared deviations from it, never a sum of squares, which would lose its digits
    where the mean is large beside the spread.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Takes in some more rows, (B, D), on any device; returns itself.

        Raises:
            ValueError: no rows, another D than before, or a value that is not finite.
        """
        rows = _checked(features, least=1, name="features")
        if self.count and rows.shape[1] != len(self.mean):
            raise ValueError(f"features have {rows.shape[1]} columns; the ones before had {len(self.mean)}")
        mean = rows.mean(dim=0)
        scatter = (rows - mean).T @ (rows - mean)  # (D, D)
        if self.count:
            total, gap = self.count + len(rows), mean - self.mean
            scatter += self.scatter + torch.outer(gap, gap) * (self.count * len(rows) / total)
            mean = self.mean + gap * (len(rows) / total)
        self.count, self.mean, self.scatter = self.count + len(rows), mean, scatter
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by one less than the count; ValueError before the second row."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows of features, and there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet_gaussians(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions, |m - n|^2 + tr(S + T - 2 (S T)^(1/2)).  Dowson & Landau 1982.

    S T is not symmetric, and rounding gives its root an imaginary part.  S^(1/2) T S^(1/2) has the same eigenvalues and is
    symmetric, so that every eigenvalue is real; one that rounding took below zero counts as zero.

    Args:
        mean, other_mean: (D,).
        covariance, other_covariance: (D, D), symmetric.

    Raises:
        ValueError: the shapes do not fit each other, a value is not finite, or a covariance is not symmetric.
    """
    m, S, n, T = (t.detach().cpu().double() for t in (mean, covariance, other_mean, other_covariance))
    D = m.numel()
    if (m.shape, n.shape, S.shape, T.shape) != ((D,), (D,), (D, D), (D, D)):
        raise ValueError(
            f"means {tuple(m.shape)} and {tuple(n.shape)} with covariances {tuple(S.shape)} and {tuple(T.shape)}; "
            "expected (D,), (D,), (D, D) and (D, D) with one D"
        )
    if not all(t.isfinite().all() for t in (m, S, n, T)):
        raise ValueError("a mean or covariance holds nan or infinity: look for the picture that brings it")
    if any((C - C.T).abs().max() > 1e-5 * C.abs().max() for C in (S, T)):
        raise ValueError("a covariance is not symmetric, and so is none")
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S^(1/2)
    product = root @ T @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (m - n).square().sum() + S.trace() + T.trace() - 2 * overlap
    return max(0.0, distance.item())  # rounding alone takes it below


def frechet_distance(real: Tensor | FeatureStatistics, fake: Tensor | FeatureStatistics) -> float:
    """How far apart two sets of features lie, each taken for a normal distribution.  Heusel et al. 2017, equation 6.

    Over the features of the published Inception network this is FID, in which 50,000 pictures are usual; over any other it
    is another ruler.  Too few pictures make it larger, and the same number on both sides does not undo it.

    Args:
        real, fake: features (N, D), or their statistics; the order does not matter.

    Returns:
        0 where mean and covariance agree, else above.

    Raises:
        ValueError: not (N, D), one D on both sides and N >= 2; or a value that is not finite.
    """
    stats = [side if isinstance(side, FeatureStatistics) else FeatureStatistics().update(side) for side in (real, fake)]
    distance = frechet_gaussians(stats[0].mean, stats[0].covariance, stats[1].mean, stats[1].covariance)
    if (fewest := min(side.count for side in stats)) <= len(stats[0].mean):
        warnings.warn(
            f"{fewest} pictures for {len(stats[0].mean)} features: a covariance from so few lacks directions, and the "
            "distance comes out biased; take more pictures than features, many more if you can, or use kid",
            stacklevel=2,
        )
    return distance


@torch.no_grad()
def extract(images: Tensor | Iterable[Tensor], extractor: Extractor, batch_size: int = 64) -> Iterator[Tensor]:
    """Features of pictures, one batch (B, D) at a time; `torch.cat([*extract(...)])` has them all.

    Args:
        images: pictures (N, 3, H, W) in the range that the extractor reads, or batches of them, which
            are taken one by one and not kept.
        extractor: pictures (B, 3, H, W) to features (B, D).
        batch_size: how many rows of a tensor are looked at together; batches stay as they come.
    """
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        yield extractor(batch).detach()


def fid(real: Tensor | Iterable[Tensor], fake: Tensor | Iterable[Tensor], extractor: Extractor, batch_size: int = 64) -> float:
    """`frechet_distance` from pictures; it is the published FID if the extractor is (see `inception.load_inception`).

    Args:
        real, fake: pictures (N, 3, H, W) in the range that the extractor reads, or batches of them.
        extractor: pictures (B, 3, H, W) to features (B, D).
        batch_size: how many pictures of a tensor are looked at together.

    Raises:
        ValueError: as `frechet_distance`.
    """
    stats = [FeatureStatistics(), FeatureStatistics()]
    for side, images in zip(stats, (real, fake), strict=True):
        for features in extract(images, extractor, batch_size=batch_size):
            side.update(features)
    return frechet_distance(*stats)


def kid(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Kernel inception distance: the squared distance of two sets under the kernel (x.y / D + 1)^3.  Bińkowski et al. 2018.

    Unlike the Fréchet distance it is right on average however few the pictures, and so below zero now and then.

    Args:
        real, fake: features (N, D) and (M, D).
        subsets: how many pairs of subsets are measured.
        subset_size: rows of each, drawn without replacement; at most N and M.
        generator: draws the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: features that do not fit, fewer than subset_size of them, or a subset_size below 2.
    """
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"{subsets} subsets of {subset_size}: expected at least 1 subset, of at least 2")
    x, y = _pair(real, fake, least=subset_size, hint="; choose a smaller subset_size")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def apart(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (subset_size * (subset_size - 1))  # nothing is compared with itself: no bias

    distances = []
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=generator)[:subset_size]]
        b = y[torch.randperm(len(y), generator=generator)[:subset_size]]
        distances.append(apart(kernel(a, a)) + apart(kernel(b, b)) - 2 * kernel(a, b).mean())
    return _mean_and_std(distances)


def inception_score(
    outputs: Tensor, splits: int = 10, probabilities: bool = False, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)): is each picture clearly of one class, and are classes many?  Salimans et al. 2016.

    It never sees a real picture: one perfect picture of every class earns the highest score, the number of classes.

    Args:
        outputs: logits (N, classes) of a classifier, or probabilities if `probabilities` says so.
        splits: into how many parts the pictures go, each scored by itself; a small part scores lower.
        probabilities: whether the outputs are probabilities.
        generator: shuffles the pictures first, since parts of one class each would score 1.

    Returns:
        Mean and standard deviation over the parts, which lie between 1 and the number of classes.

    Raises:
        ValueError: outputs that do not fit, fewer of them than splits, or probabilities that do not sum to 1.
    """
    if splits < 1:
        raise ValueError(f"{splits} splits; expected at least 1")
    p = _checked(outputs, least=splits, name="outputs")
    if probabilities and not ((p >= 0).all() and torch.allclose(p.sum(dim=1), p.new_ones(()), atol=1e-3)):
        raise ValueError("probabilities lie in [0, 1] and each row sums to 1; for logits leave probabilities=False")
    p = p if probabilities else p.softmax(dim=1)
    parts = p[torch.randperm(len(p), generator=generator)].tensor_split(splits)
    divergences = [(torch.xlogy(q, q) - torch.xlogy(q, q.mean(dim=0))).sum(dim=1) for q in parts]  # 0 log 0 is 0
    return _mean_and_std([divergence.mean().exp() for divergence in divergences])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 256) -> tuple[float, float]:
    """Share of fakes that look real, and share of reals that the fakes cover.  Kynkäänniemi et al. 2019, equations 1 and 2.

    A set covers the balls around its members that reach to their k-th nearest neighbours.  Every distance is taken by itself,
    so that pictures which are copies of each other count right; a few thousand pictures a side are a matter of seconds.

    Args:
        real, fake: features (N, D) and (M, D).
        k: which neighbour of the same set the ball of a member just reaches.
        block: rows whose distances are in memory at a time.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: features that do not fit, or no more than k of them.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    x, y = _pair(real, fake, least=k + 1, hint=f", to have a neighbour number {k}")
    return _covered(y, by=x, k=k, block=block), _covered(x, by=y, k=k, block=block)


def clip_score(image_embeddings: Tensor, text_embeddings: Tensor) -> float:
    """How well pictures fit their captions in the eyes of a CLIP: the mean of 100 max(cos, 0).  Hessel et al. 2021, section 3.

    The paper multiplies by 2.5; the 100 is what is reported today.

    Args:
        image_embeddings: (N, D), of any length.
        text_embeddings: (N, D), row i of the caption of picture i.

    Raises:
        ValueError: shapes that differ, no rows, a value that is not finite, or a row of zeros, which points nowhere.
    """
    x = _checked(image_embeddings, least=1, name="image embeddings")
    y = _checked(text_embeddings, least=1, name="text embeddings")
    if x.shape != y.shape:
        raise ValueError(f"{tuple(x.shape)} of images and {tuple(y.shape)} of text; expected a caption for each picture")
    lengths = x.norm(dim=1) * y.norm(dim=1)
    if (lengths == 0).any():
        raise ValueError("an embedding is all zeros, and has no direction to compare")
    return (100 * ((x * y).sum(dim=1) / lengths).clamp(min=0)).mean().item()


def _covered(points: Tensor, by: Tensor, k: int, block: int) -> float:
    """Share of the points (N, D) that lie within a ball around one of `by` (M, D)."""

    def distances(rows: Tensor) -> Tensor:  # (B, M); not by matrix products, whose rounding would move points on the rim
        return torch.cdist(rows, by, compute_mode="donot_use_mm_for_euclid_dist")

    # the nearest member to each is the member itself, or a copy of it, at 0: neighbour k is at place k + 1
    radii = torch.cat([distances(rows).kthvalue(k + 1, dim=1).values for rows in by.split(block)])  # (M,)
    inside = torch.cat([(distances(rows) <= radii).any(dim=1) for rows in points.split(block)])  # (N,)
    return inside.double().mean().item()


def _checked(features: Tensor, least: int, name: str, hint: str = "") -> Tensor:
    """Features in float64 on the CPU, if they are what they should be."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} are {tuple(features.shape)}; expected (N, D), a row for each picture")
    if len(features) < least:
        raise ValueError(f"{name} of {len(features)} pictures; expected at least {least}{hint}")
    if not features.isfinite().all():
        bad = (~features.isfinite()).any(dim=1).nonzero()[0].item()
        raise ValueError(f"{name} hold nan or infinity, first in row {bad}: look at that picture")
    return features.detach().cpu().double()  # in this order: MPS knows no float64


def _pair(real: Tensor, fake: Tensor, least: int, hint: str) -> tuple[Tensor, Tensor]:
    """Two sets of features that can be compared."""
    x, y = (_checked(side, least, name, hint) for side, name in ((real, "real features"), (fake, "fake features")))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real features have {x.shape[1]} columns and fake ones {y.shape[1]}: two extractors?")
    return x, y


def _mean_and_std(values: list[Tensor]) -> tuple[float, float]:
    """Of all there are, not of a sample: the published scores divide by their number."""
    stacked = torch.stack(values)
    return stacked.mean().item(), stacked.std(correction=0).item()
