"""From 2D observations of persons to hypotheses of their 3D poses; what ``fasthyp sample`` does.

observations = read_observations("heatmaps.npz")
result = estimate(observations, LiftingFlow.from_pretrained(), num_samples=1000, seed=0)
result.hypotheses  # (P, 1000, 13, 3) mm
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fasthyp import __version__
from fasthyp._graphs import Noise
from fasthyp._seed import check_int
from fasthyp.estimator import PoseEstimator, is_fitted
from fasthyp.heatmaps import GaussianFit
from fasthyp.models.lifting import LiftingFlow
from fasthyp.observations import JOINTS, Gaussians, Observations
from fasthyp.skeleton import COCO13_JOINTS

BATCH_SIZE = 16
"""Persons at a time. The hypotheses do not depend on it (on a GPU: but for rounding)."""


@dataclass(frozen=True)
class PoseHypotheses:
    """Distribution of the 3D poses of P persons, M hypotheses of each.

    Poses are in millimetres, mid-hip centred, in camera axes: x right, y down, z away from the
    camera. Joints in the order of :data:`fasthyp.skeleton.COCO13_JOINTS`.

    Attributes:
        hypotheses: (P, M, 13, 3) mm.
        log_prob: (P, M) log-density of each, nats, over the 39 coordinates in metres.
        mode: (P, 13, 3) mm, the hypothesis of z = 0.
        std: (P, 13) mm, root-mean-square distance of the hypotheses from their mean:
            ``sqrt(trace(covariance))``.
        covariance: (P, 13, 3, 3) mm^2 of the hypotheses about their mean (sum / M).
        gaussians: 2D evidence as it was fitted or given, in cells.
        fit: the whole fit, where there were heatmaps.
        observed: (P, 13) whether the joint's heatmap could be fitted. One that could not be enters
            as a wide blob about the other joints.
        seed: of the noise.
        seconds: time of the stages ``fit``, ``condition`` and ``sample``.
    """

    hypotheses: np.ndarray
    log_prob: np.ndarray
    mode: np.ndarray
    std: np.ndarray
    covariance: np.ndarray
    gaussians: Gaussians
    fit: GaussianFit | None
    observed: np.ndarray
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, file: IO[bytes], model: str) -> None:
        """Write everything as ``.npz``; the same numbers give the same bytes.

        Args:
            file: opened for writing.
            model: name of the model, to be kept beside the numbers.
        """
        arrays: dict[str, Any] = {
            "hypotheses": self.hypotheses,
            "log_prob": self.log_prob,
            "mode": self.mode,
            "std": self.std,
            "covariance": self.covariance,
            "fit_amplitude": self.gaussians.amplitude,
            "fit_mean": self.gaussians.mean,
            "fit_covariance": self.gaussians.covariance,
        }
        if self.fit is not None:
            for name in ("sigma_x", "sigma_y", "theta", "rmse", "converged"):
                arrays[f"fit_{name}"] = getattr(self.fit, name)
        arrays |= {
            "joint_names": np.array(COCO13_JOINTS),
            "seed": np.uint64(self.seed),
            "model": np.array(model),
            "version": np.array(__version__),
        }
        np.savez(file, **arrays)


def estimate(
    observations: Observations,
    model: LiftingFlow,
    num_samples: int = 1000,
    seed: int = 0,
    precision: str = "high",
    *,
    batch_size: int = BATCH_SIZE,
    first: int = 0,
    progress: Callable[[int], None] = lambda persons: None,
) -> PoseHypotheses:
    """Hypotheses of every person's pose.

    Args:
        observations: P persons.
        model: on the device on which all is to be computed.
        num_samples: M.
        seed: hypothesis m of person p depends on the seed, p and m alone.
        precision: of :class:`fasthyp.HypothesisSampler`.
        batch_size: persons at a time.
        first: number of the first person, where these are part of a longer list.
        progress: called with the number of persons done since the last call.

    Raises:
        ValueError: none of a person's heatmaps could be fitted, the model gives no finite numbers,
            or an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    check_int("seed", seed, 0, 2**64)
    check_int("first", first, 0, 2**32 - len(observations))
    device = model.centre.device
    clock = _Clock(device)
    estimator = PoseEstimator(model, num_samples, precision)
    parts: list[list[Tensor]] = []
    fits: list[GaussianFit] = []
    for start in range(0, len(observations), batch_size):
        stop = min(start + batch_size, len(observations))
        with clock("fit"):
            if observations.heatmaps is not None:
                fit = estimator.fit(observations.heatmaps[start:stop].to(device))
                fits.append(GaussianFit(*(values.cpu() for values in fit)))
                given = Gaussians(fit.amplitude, fit.mean, fit.covariance)
                observed = is_fitted(fit)
            else:
                assert observations.gaussians is not None
                given = Gaussians(*(x[start:stop].to(device) for x in observations.gaussians))
                observed = torch.ones(stop - start, JOINTS, dtype=torch.bool, device=device)
        _check_observed(observed, first + start)
        with clock("condition"), torch.no_grad():
            cond = estimator.condition(given, observed, observations.size)
        with clock("sample"), torch.no_grad():
            noise = Noise(seed, first + start)
            poses, log_prob, mode, _, std, covariance = estimator.sample(cond, noise)
            _check_finite(poses, first + start)
        results = (poses, log_prob, mode, std, covariance, observed)
        parts.append([x.cpu() for x in (*results, *given)])
        progress(stop - start)
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    arrays = [part.numpy() for part in joined[:6]]
    return PoseHypotheses(
        hypotheses=arrays[0],
        log_prob=arrays[1],
        mode=arrays[2],
        std=arrays[3],
        covariance=arrays[4],
        gaussians=Gaussians(*joined[6:]),
        fit=GaussianFit(*map(torch.cat, zip(*fits, strict=True))) if fits else None,
        observed=arrays[5],
        seed=seed,
        seconds=clock.seconds,
    )


def check_memory(persons: int, num_samples: int) -> None:
    """ValueError if the hypotheses of so many persons are more than this machine can hold."""
    # as parts and joined, and several times over while a batch is computed
    copies = 2 * persons + 6 * min(persons, BATCH_SIZE)
    needed = 4 * copies * num_samples * (3 * JOINTS + 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * memory:
        raise ValueError(
            f"num_samples: {num_samples} hypotheses of {persons} persons need "
            f"{needed / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB"
        )


def _check_observed(observed: Tensor, first: int) -> None:
    nothing = (~observed.any(1)).nonzero()
    if len(nothing):
        raise ValueError(
            f"heatmaps: none of person {first + int(nothing[0])}'s heatmaps could be fitted"
        )


def _check_finite(poses: Tensor, first: int) -> None:
    bad = (~poses.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise ValueError(f"model: its hypotheses of person {first + int(bad[0])} are not finite")


class _Clock:
    """Adds up the seconds spent in each named stage, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
