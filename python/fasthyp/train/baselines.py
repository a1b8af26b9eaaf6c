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
    """The pose (B, J, 3) in metres of the known person with the nearest ``features``."""
    query, features, poses = (
        *persons.need("features"),
        *known.need("features", "joints_3d"),
    )
    nearest = [torch.cdist(rows, features).argmin(1) for rows in query.split(256)]
    return poses[torch.cat(nearest)]


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
