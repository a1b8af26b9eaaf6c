"""How good the lifting model is: errors, baselines, likelihood, calibration, reprojection."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthyp.data.mocap import load_cmu
from fasthyp.data.simulate import PoseSimulator, SimulationConfig
from fasthyp.metrics import confidence_rank, mpjpe, over_hypotheses, sharpness
from fasthyp.models.lifting import LiftingFlow
from fasthyp.skeleton import COCO13_JOINTS, COCO17_TO_COCO13
from fasthyp.train.baselines import nearest_2d

_CHUNK = 128
_FARTHEST = 1.5
_POOL_SEED_OFFSET = 10_000


def evaluate_lifting(
    model: LiftingFlow,
    data_path: str | os.PathLike[str],
    num_samples: int = 200,
    max_persons: int | None = None,
    pool: int = 100_000,
    seed: int = 0,
    precision: str = "highest",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate on the held-out test clips, each frame seen once by a random simulated camera.

    The baselines see the same persons: the mean training pose (camera axes), and the training
    pose whose exact 2D projection is nearest to the fitted means, each joint weighted by its
    fitted precision, out of ``pool`` training frames seen by random cameras.

    Args:
        model: the model to evaluate.
        data_path: CMU poses, see :func:`fasthyp.data.load_cmu`.
        num_samples: hypotheses per person; the first is the mode (z = 0).
        max_persons: evaluate this many evenly spaced test frames; None takes all.
        pool: size of the pool of the nearest-2D baseline.
        seed: of the cameras, the 2D errors and the hypotheses.
        precision: of :class:`fasthyp.HypothesisSampler`.
        progress: called with (persons done, persons).

    Returns:
        ``*_mm``: mean per joint position errors (MPJPE) in mm; ``nll``: mean negative
        log-likelihood in nats of the 39 numbers in metres, of poses with the simulator's target
        noise; ``inside_50``, ``inside_90``: per joint, the share of persons whose true joint lies
        in the region that holds 50% or 90% of the hypotheses (Mahalanobis distance to their mean);
        ``implausible``: share of hypotheses with a joint farther than 1.5 m from the mid-hip.
    """
    test, train = load_cmu(data_path, "test"), load_cmu(data_path, "train")
    chosen = torch.arange(len(test))
    if max_persons is not None and max_persons < len(test):
        chosen = torch.linspace(0, len(test) - 1, max_persons).round().long()
    persons = PoseSimulator(test.poses, SimulationConfig(augment=False)).sample(
        len(chosen), torch.Generator().manual_seed(seed), chosen
    )
    known = PoseSimulator(train.poses, SimulationConfig(augment=False)).sample(
        pool, torch.Generator().manual_seed(seed + _POOL_SEED_OFFSET)
    )

    mode, best, average, single, nll, ranks, implausible = [], [], [], [], [], [], 0
    for start in range(0, len(chosen), _CHUNK):
        rows = slice(start, start + _CHUNK)
        truth = persons.clean_pose[rows]
        with torch.no_grad():
            cond = model.condition(
                persons.amplitude[rows], persons.mean[rows], persons.covariance[rows]
            )
            nll.append(-model.log_prob(persons.pose[rows, None], cond)[:, 0])
            pose = model.sample(cond, num_samples, seed + start, True, precision=precision)
        assert isinstance(pose, Tensor)
        error = mpjpe(pose, truth[:, None])
        mode.append(error[:, 0])
        single.append(error[:, -1])
        best.append(over_hypotheses(error).best)
        drawn = pose[:, 1:]
        average.append(mpjpe(drawn.mean(1), truth))
        ranks.append(confidence_rank(drawn, persons.pose[rows]))
        implausible += int((drawn.norm(dim=-1).amax(-1) > _FARTHEST).sum())
        if progress is not None:
            progress(min(start + _CHUNK, len(chosen)), len(chosen))

    truth = persons.clean_pose
    mean_pose = known.clean_pose.mean(0)
    nearest = known.clean_pose[nearest_2d(persons.mean, persons.covariance, known.true_mean)]
    covered = [(torch.cat(ranks) <= level).double().mean(0) for level in (0.5, 0.9)]
    subject = test.subject[chosen]

    def millimetres(values: list[Tensor]) -> float:
        return 1000 * float(torch.cat(values).mean(dtype=torch.float64))

    mode_error = torch.cat(mode)
    return {
        "persons": len(chosen),
        "num_samples": num_samples,
        "seed": seed,
        "mode_mm": millimetres(mode),
        "mode_median_mm": 1000 * float(mode_error.median()),
        "best_mm": millimetres(best),
        "mean_of_hypotheses_mm": millimetres(average),
        "single_hypothesis_mm": millimetres(single),
        "mean_pose_mm": millimetres([mpjpe(mean_pose, truth)]),
        "nearest_2d_mm": millimetres([mpjpe(nearest, truth)]),
        "mode_mm_by_subject": {
            str(number): 1000 * float(mode_error[subject == number].mean())
            for number in sorted(set(subject.tolist()))
        },
        "nll": float(torch.cat(nll).mean()),
        "nll_median": float(torch.cat(nll).median()),
        "inside_50": dict(zip(COCO13_JOINTS, covered[0].tolist(), strict=True)),
        "inside_90": dict(zip(COCO13_JOINTS, covered[1].tolist(), strict=True)),
        "implausible": implausible / (len(chosen) * max(1, num_samples - 1)),
    }


def reprojection_distance(pose: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Distance (B, M, 13) in cells between hypotheses and fitted 2D means.

    Each hypothesis is projected by the weak-perspective camera (one scale, one translation, no
    rotation) that fits the means best in the precision-weighted least-squares sense.

    Args:
        pose: (B, M, 13, 3), camera axes.
        mean, covariance: (B, 13, 2), (B, 13, 2, 2) of the fitted Gaussians.
    """
    weight = 1 / (covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + 1)
    weight = (weight / weight.sum(-1, keepdim=True))[:, None, :, None]
    flat, target = pose[..., :2], mean[:, None]
    flat = flat - (weight * flat).sum(-2, keepdim=True)
    target = target - (weight * target).sum(-2, keepdim=True)
    scale = (weight * flat * target).sum((-1, -2)) / (weight * flat * flat).sum((-1, -2))
    return (scale[..., None, None] * flat - target).norm(dim=-1)


def evaluate_heatmaps(
    model: LiftingFlow,
    path: str | os.PathLike[str],
    num_samples: int = 200,
    seed: int = 0,
    precision: str = "highest",
) -> dict[str, Any]:
    """Fit, lift and reproject real heatmaps; there is no 3D truth to compare with.

    Args:
        path: ``.npz`` with ``heatmaps`` (P, 17, H, W) or (17, H, W), 17 COCO joints or the 13.

    Returns:
        ``reprojection_cells``: median over persons, hypotheses and joints of the distance to the
        fitted mean; ``reprojection_sharp_cells``: over joints with a fitted std below 1.8 cells;
        ``reprojection_sigmas``: median distance over the fitted std; ``mode_reprojection_cells``:
        of the z = 0 hypothesis alone; ``spread_mm``: per joint, median over persons of the root
        mean square distance of the hypotheses to their mean; ``spread_xy_mm``: the same in the
        plane of the picture.
    """
    from fasthyp.heatmaps import fit_gaussians

    with np.load(path, allow_pickle=False) as data:
        if "heatmaps" not in data.files:
            raise ValueError(f"{path}: expected an array 'heatmaps', found {sorted(data.files)}")
        heatmaps = torch.from_numpy(data["heatmaps"].astype(np.float32))
    if heatmaps.ndim == 3:
        heatmaps = heatmaps[None]
    if heatmaps.ndim != 4 or heatmaps.shape[1] not in (13, 17):
        raise ValueError(f"{path}: expected (P, 13 or 17, H, W), got {tuple(heatmaps.shape)}")
    if heatmaps.shape[1] == 17:
        heatmaps = heatmaps[:, COCO17_TO_COCO13]
    height, width = heatmaps.shape[-2:]
    fit = fit_gaussians(heatmaps)
    mean, covariance = fit.mean.float(), fit.covariance.float()
    with torch.no_grad():
        cond = model.condition(fit.amplitude.float(), mean, covariance, (height, width))
        pose = model.sample(cond, num_samples, seed, True, precision=precision)
    assert isinstance(pose, Tensor)
    distance = reprojection_distance(pose, mean, covariance)
    std = torch.linalg.det(covariance).clamp_min(0).pow(0.25)[:, None]
    spread, flat_spread = sharpness(1000 * pose), sharpness(1000 * pose[..., :2])
    return {
        "persons": len(heatmaps),
        "num_samples": num_samples,
        "seed": seed,
        "reprojection_cells": float(distance.median()),
        "reprojection_sharp_cells": float(distance[(std < 1.8).expand_as(distance)].median()),
        "reprojection_sigmas": float((distance / std).median()),
        "mode_reprojection_cells": float(distance[:, 0].median()),
        "spread_mm": dict(zip(COCO13_JOINTS, spread.median(0).values.tolist(), strict=True)),
        "spread_xy_mm": dict(
            zip(COCO13_JOINTS, flat_spread.median(0).values.tolist(), strict=True)
        ),
    }
