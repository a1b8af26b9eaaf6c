"""Many hypotheses of one pose: statistics of their errors, spread, representatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasthyp._seed import check_int, resolve_seed
from fasthyp._tensors import check_floating

_KMEANS_STARTS = 4


class OverHypotheses(NamedTuple):
    """Statistics of an error over the hypotheses of each image, in the unit of the error.

    Attributes:
        best: least error ("best of M", minMPJPE).
        mean: mean error.
        median: ``torch.median``'s: of an even number the lower of the two in the middle, as
            Wehrbein et al., ICCV 2021, report it.
        worst: greatest error.
    """

    best: Tensor
    mean: Tensor
    median: Tensor
    worst: Tensor


def over_hypotheses(errors: Tensor, dim: int = -1) -> OverHypotheses:
    """Best, mean, median and worst error over hypotheses.

    The protocol of Wehrbein et al., ICCV 2021, section 4: each of the four per image, then the mean
    over images.

    Args:
        errors: for instance (B, M) of :func:`mpjpe`; its last dimension the hypotheses.
        dim: the dimension of the hypotheses, if it is another.

    Returns:
        Four tensors of the shape of ``errors`` without ``dim``. NaN where an error is.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("errors", errors)
    check_int("dim", dim, -errors.ndim, errors.ndim)
    if errors.shape[dim] == 0:
        raise ValueError(f"errors: expected at least one hypothesis, got {tuple(errors.shape)}")
    return OverHypotheses(
        errors.amin(dim),
        errors.mean(dim, dtype=torch.float64).to(errors.dtype),
        errors.median(dim).values,
        errors.amax(dim),
    )


def diversity(hypotheses: Tensor, correction: int = 1) -> Tensor:
    """Standard deviation of the hypotheses per joint and direction.

    Wehrbein et al., ICCV 2021, section 4.5 (mean over joints and images; depth is the third): their
    code takes ``correction=1``; HUMR's (WACV 2025), of vertices, 0.

    Args:
        hypotheses: (..., M, J, D) in any unit.
        correction: 1 divides by M - 1, 0 by M.

    Returns:
        (..., J, D), in the unit of the hypotheses; NaN for M <= ``correction``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_hypotheses(hypotheses)
    check_int("correction", correction, 0, 2)
    if hypotheses.shape[-3] <= correction:
        return hypotheses.new_full((*hypotheses.shape[:-3], *hypotheses.shape[-2:]), torch.nan)
    return hypotheses.std(-3, correction=correction)


def sharpness(hypotheses: Tensor) -> Tensor:
    """Root mean square distance of the hypotheses to their mean, per joint: the smaller, the
    sharper the prediction, which is a virtue as far as it is calibrated.

    Gneiting, Balabdaoui and Raftery, "Probabilistic forecasts, calibration and sharpness", JRSS-B
    2007. It is the root of the trace of the covariance (sum / M): the ``std`` of
    :class:`fasthyp.PoseEstimate`.

    Args:
        hypotheses: (..., M, J, D) in any unit.

    Returns:
        (..., J), in the unit of the hypotheses.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_hypotheses(hypotheses)
    return hypotheses.var(-3, correction=0).sum(-1).sqrt()


class Clusters(NamedTuple):
    """Result of :func:`kmeans`.

    Attributes:
        centres: (B, k, ...) means of the clusters, those with the most members first.
        labels: (B, M) int64, the cluster of each hypothesis.
        sizes: (B, k) int64, members of each cluster.
    """

    centres: Tensor
    labels: Tensor
    sizes: Tensor


def kmeans(
    hypotheses: Tensor,
    k: int,
    *,
    seed: int | None = None,
    max_iter: int = 100,
    starts: int = _KMEANS_STARTS,
) -> Clusters:
    """Quantises the hypotheses of each image to k representatives.

    How ProHMR (ICCV 2021, supplement 5.2: 4096 samples) and Wehrbein et al. (ICCV 2021, appendix C)
    compare few hypotheses with methods that give few: k-means of the samples, errors of the
    centres. Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii, SODA 2007), of
    which the one with the least sum of squared distances is kept; all images and starts at once.

    Args:
        hypotheses: (B, M, ...), finite; distances are over everything after M.
        k: number of clusters, 1 to M. Where fewer hypotheses are distinct, some centres coincide.
        seed: of the starts; None draws one from PyTorch's default generator.
        max_iter: most rounds of Lloyd's algorithm.
        starts: number of starts.

    Returns:
        Centres, labels and sizes, without gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("hypotheses", hypotheses)
    if hypotheses.ndim < 3 or 0 in hypotheses.shape[1:]:
        raise ValueError(f"hypotheses: expected shape (B, M, ...), got {tuple(hypotheses.shape)}")
    number = hypotheses.shape[1]
    check_int("k", k, 1, number + 1)
    check_int("max_iter", max_iter, 1, 2**31)
    check_int("starts", starts, 1, 2**31)
    generator = torch.Generator().manual_seed(resolve_seed(seed, None) % 2**63)
    if not torch.isfinite(hypotheses).all():
        raise ValueError("hypotheses: expected finite numbers, got NaN or infinity")

    images = len(hypotheses)
    dtype = torch.promote_types(hypotheses.dtype, torch.float32)
    samples = hypotheses.detach().flatten(2).to(dtype)
    # Distances are better from numbers about zero.
    middle = samples.mean(1, keepdim=True)
    samples = (samples - middle).repeat_interleave(starts, 0)
    centres = _plus_plus(samples, k, generator)
    labels = torch.full(samples.shape[:2], -1, device=samples.device)
    for _ in range(max_iter):
        distance = _squared_distances(samples, centres)
        nearest = distance.argmin(-1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        centres = _means(samples, labels, centres)
    else:
        distance = _squared_distances(samples, centres)
        labels = distance.argmin(-1)
    cost = distance.gather(-1, labels[..., None]).sum((1, 2)).view(images, starts)
    chosen = cost.argmin(1) + starts * torch.arange(images, device=samples.device)
    labels, centres = labels[chosen], centres[chosen]

    sizes = torch.zeros(images, k, dtype=torch.int64, device=samples.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    sizes, order = sizes.sort(stable=True, dim=1, descending=True)
    rank = order.argsort(1)
    centres = centres.gather(1, order[..., None].expand_as(centres)) + middle
    return Clusters(
        centres.reshape(images, k, *hypotheses.shape[2:]).to(hypotheses.dtype),
        rank.gather(1, labels),
        sizes,
    )


def _squared_distances(samples: Tensor, centres: Tensor) -> Tensor:
    """(R, M, k)."""
    square = samples.square().sum(-1)[..., None] + centres.square().sum(-1)[:, None]
    return torch.baddbmm(square, samples, centres.mT, alpha=-2).clamp_min_(0)


def _means(samples: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Means of the clusters; an empty one keeps its centre."""
    one_hot = torch.nn.functional.one_hot(labels, before.shape[1]).to(samples.dtype)
    counts = one_hot.sum(1)[..., None]
    return torch.where(counts > 0, (one_hot.mT @ samples) / counts.clamp_min(1), before)


def _plus_plus(samples: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k samples of each row (R, M, D), each drawn with the squared distance to those before."""
    rows, number = samples.shape[:2]
    everyone = torch.arange(rows, device=samples.device)
    chosen: list[Tensor] = []
    distance = samples.new_ones(rows, number)
    for _ in range(k):
        total = distance.cumsum(1, dtype=torch.float64)
        draw = torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(samples.device)
        # Where all distances are zero, whatever comes first.
        place = torch.searchsorted(total, draw * total[:, -1:], right=True).clamp_max(number - 1)
        centre = samples[everyone, place[:, 0]]
        chosen.append(centre)
        new = (samples - centre[:, None]).square().sum(-1)
        distance = new if len(chosen) == 1 else torch.minimum(distance, new)
    return torch.stack(chosen, 1)


def check_hypotheses(hypotheses: Tensor) -> None:
    """A floating-point (..., M, J, D), nothing of it empty but leading dimensions."""
    check_floating("hypotheses", hypotheses)
    if hypotheses.ndim < 3 or 0 in hypotheses.shape[-3:]:
        raise ValueError(
            f"hypotheses: expected shape (..., M, J, D), got {tuple(hypotheses.shape)}"
        )
