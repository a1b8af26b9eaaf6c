"""Best-of-M evaluation of more hypotheses than fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasthyp._seed import check_int, resolve_seed
from fasthyp._tensors import check_floating
from fasthyp.metrics.pose import mpjpe
from fasthyp.sampling import HypothesisSampler

Draw = Callable[[int, int], Tensor]
"""``draw(first, count)``: hypotheses number first to first + count - 1 of B images."""

_CPU_BYTES, _DEVICE_BYTES = 2**20, 2**24
"""Of the hypotheses at a time: on a CPU few enough for its cache, elsewhere enough to fill it."""
_LEAST = 256
"""Hypotheses of an image at a time: what a flow does once for each image is then a small part."""


class BestOfM(NamedTuple):
    """Result of :func:`best_of_m`, for each of B images.

    Attributes:
        best: (B,) least error.
        number: (B,) int64, number of the hypothesis that has it.
        pose: (B, J, D) that hypothesis.
        mean: (B,) float64, mean error.
        worst: (B,) greatest error.
    """

    best: Tensor
    number: Tensor
    pose: Tensor
    mean: Tensor
    worst: Tensor


@torch.no_grad()
def best_of_m(
    draw: Draw,
    truth: Tensor,
    num_samples: int,
    *,
    error: Callable[[Tensor, Tensor], Tensor] = mpjpe,
    rows: int | None = None,
) -> BestOfM:
    """Best, mean and worst error of M hypotheses, drawn and judged a part at a time.

    Memory does not grow with M: ProHMR (ICCV 2021, supplement 5.3) and Wehrbein et al. (ICCV 2021,
    figure 5) plot the best error up to large M. (A median needs all errors at once: see
    :func:`over_hypotheses`.)

    Args:
        draw: see :data:`Draw`: returns (B, count, J, D), or (B, count, J * D) joint by joint.
            :func:`hypothesis_source` makes one of a sampler.
        truth: (B, J, D), in the unit of the hypotheses.
        num_samples: M.
        error: of hypotheses (B, m, J, D) and ``truth[:, None]``: (B, m). :func:`mpjpe` unless told;
            ``functools.partial(mpjpe, root=0)`` centres on a root, :func:`pa_mpjpe` aligns.
        rows: hypotheses at a time, of all images together (at least one of each); unless told, a
            megabyte of them on a CPU, 16 elsewhere, but at least 256 of each image.

    Returns:
        In the unit of the hypotheses. A hypothesis whose error is NaN makes all but ``best``,
        ``number`` and ``pose`` NaN; where all are, ``number`` is -1 and ``best`` and ``pose`` NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("truth", truth)
    if truth.ndim != 3 or 0 in truth.shape:
        raise ValueError(f"truth: expected shape (B, J, D), got {tuple(truth.shape)}")
    check_int("num_samples", num_samples, 1, 2**32)
    images = len(truth)
    if rows is None:
        budget = _CPU_BYTES if truth.device.type == "cpu" else _DEVICE_BYTES
        chunk = max(_LEAST, budget // (truth.numel() * truth.element_size()))
    else:
        check_int("rows", rows, 1, 2**63)
        chunk = max(1, rows // images)
    inf = truth.new_full((images,), torch.inf)
    best, worst = inf, -inf
    number = torch.full((images,), -1, device=truth.device)
    pose = torch.full_like(truth, torch.nan)
    total = torch.zeros(images, dtype=torch.float64, device=truth.device)
    everyone = torch.arange(images, device=truth.device)
    for first in range(0, num_samples, chunk):
        count = min(chunk, num_samples - first)
        poses = draw(first, count)
        if poses.shape[:2] != (images, count) or poses[0, 0].numel() != truth[0].numel():
            expected = (images, count, *truth.shape[1:])
            raise ValueError(f"draw: expected to return {expected}, got {tuple(poses.shape)}")
        poses = poses.reshape(images, count, *truth.shape[1:])
        errors = error(poses, truth[:, None])
        if errors.shape != (images, count):
            raise ValueError(
                f"error: expected to return {(images, count)}, got {tuple(errors.shape)}"
            )
        least, place = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).min(1)
        better = least < best
        best = torch.where(better, least, best)
        number = torch.where(better, first + place, number)
        pose = torch.where(better[:, None, None], poses[everyone, place], pose)
        worst = torch.maximum(worst, errors.amax(1))
        total += errors.sum(1, dtype=torch.float64)
    best = torch.where(number < 0, torch.nan, best)
    return BestOfM(best, number, pose, total / num_samples, worst)


def hypothesis_source(
    sampler: HypothesisSampler,
    cond: Tensor | Sequence[Tensor] | None = None,
    *,
    seed: int | None = None,
    fixed: Tensor | None = None,
    include_mode: bool = False,
    image_offset: int = 0,
) -> Draw:
    """Draws the hypotheses of a sampler by their numbers, for :func:`best_of_m`.

    ``source(first, count)`` (B, count, D) are hypotheses ``first`` to ``first + count - 1`` of
    ``sampler(cond, M, seed=seed, ...)``, whatever M is. Only those asked for are computed.

    Args:
        sampler: of the flow.
        cond, seed, fixed, include_mode, image_offset: as for the sampler. Without ``seed`` one is
            drawn here, once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(sampler, HypothesisSampler):
        raise TypeError(f"sampler: expected a HypothesisSampler, got {type(sampler).__name__}")
    seed = resolve_seed(seed, None)
    check_int("image_offset", image_offset, 0, 2**32)

    def source(first: int, count: int) -> Tensor:
        x = sampler(
            *(cond, count),
            seed=seed,
            fixed=fixed,
            include_mode=include_mode,
            image_offset=image_offset,
            first_sample=first,
        )
        assert isinstance(x, Tensor)
        return x

    return source
