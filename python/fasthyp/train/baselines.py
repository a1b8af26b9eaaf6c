"""What any model has to beat: the mean pose, and the training person that looks most alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.metrics import mpjpe


def mean_pose(persons: PersonBatch, known: PersonBatch) -> Tensor:
    """The mean of the known poses for each person (B, J, 3), metres."""
    (poses,) = known.need("joints_3d")
    return poses.mean(0).expand(len(persons), -1, -1)


def nearest_neighbour(persons: PersonBatch, known: PersonBatch) -> Tensor:
    """The pose (B, J, 3) in metres of the known person whose exact 2D projection is the nearest to
    the detected one (:func:`nearest_2d`), by the joints that are detected and projected.

    Raises:
        ValueError: the persons lack detections, the known ones projections or poses, or they have
            no joint in common.
    """
    mean, covariance = persons.need("mean", "covariance")
    projected, poses = known.need("joints_2d", "joints_3d")
    common = [name for name in persons.detector_names if name in known.joint_names]
    if not common:
        raise ValueError(
            f"persons: expected detections of some of {known.joint_names}, "
            f"got {persons.detector_names}"
        )
    seen = [persons.detector_names.index(name) for name in common]
    exact = [known.joint_names.index(name) for name in common]
    return poses[nearest_2d(mean[:, seen], covariance[:, seen], projected[:, exact])]


def nearest_2d(mean: Tensor, covariance: Tensor, known: Tensor) -> Tensor:
    """Which known 2D pose is the nearest, wherever in the picture and however large both are, by
    the squared distances of the joints, each weighted by its precision.

    Args:
        mean, covariance: (B, K, 2), (B, K, 2, 2) of the fitted Gaussians, cells.
        known: (N, K, 2).

    Returns:
        (B,) indices.
    """

    def normalise(points: Tensor) -> Tensor:
        points = points - points.mean(1, keepdim=True)
        return points / points.square().sum((1, 2), keepdim=True).sqrt()

    weight = 1 / (covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1)
    weight = weight.expand(-1, -1, 2).flatten(1)
    query, reference = normalise(mean).flatten(1), normalise(known).flatten(1)
    # sum w (q - r)^2 up to sum w q^2, which is the same for every r.
    return torch.cat(
        [
            (w @ reference.square().T - 2 * (w * q) @ reference.T).argmin(1)
            for w, q in zip(weight.split(256), query.split(256), strict=True)
        ]
    )


def baseline_errors(
    source: PersonSource,
    number: int,
    seed: int,
    part: str = "validation",
    pool: int = 20_000,
) -> dict[str, float]:
    """Errors (MPJPE, mm) of both on the persons ``source.sample(number, seed, part)``.

    Args:
        source: of the persons.
        number, seed, part: which persons; a recipe validates on ``validation_size`` of
            :data:`fasthyp.train.recipe.VALIDATION_SEED`.
        pool: known training persons.
    """
    persons, known = source.sample(number, seed, part), source.sample(pool, seed, "train")
    (truth,) = persons.need("joints_3d")
    return {
        f"{name}_mm": 1000 * float(mpjpe(poses, truth).mean(dtype=torch.float64))
        for name, poses in (
            ("mean_pose", mean_pose(persons, known)),
            ("nearest_neighbour", nearest_neighbour(persons, known)),
        )
    }
