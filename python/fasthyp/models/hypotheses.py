"""What every model of persons answers with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fasthyp.data.persons import PersonBatch


@dataclass(frozen=True)
class Hypotheses:
    """M hypotheses of each of B persons.

    Attributes:
        joints_3d: (B, M, J, 3) metres, camera axes (x right, y down, z forward).
        joint_names: the J joints.
        log_prob: (B, M) nats, where the model has a density.
        vertices: (B, M, V, 3) metres, where asked for and the model has a body.
        uncertainty: (B, J) of each joint, the larger the less certain, in the model's own unit;
            None where the spread of the hypotheses says it.
    """

    joints_3d: Tensor
    joint_names: tuple[str, ...]
    log_prob: Tensor | None = None
    vertices: Tensor | None = None
    uncertainty: Tensor | None = None


class Hypothesiser(Protocol):
    """What evaluation and batch sampling ask of a model."""

    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        """Hypotheses of persons; the first is the mode with ``include_mode``. The same seed gives
        the same hypotheses, and the first of them whatever their number.

        ``image_offset`` is the number of the first person, where these are part of a longer list:
        hypothesis m of person p depends on the seed, p and m alone. A model may lack it: it is
        then asked for one person at a time. It may have a ``precision``: that of
        :class:`fasthyp.HypothesisSampler`.
        """
        ...


def draw(
    model: Hypothesiser,
    persons: PersonBatch,
    num_samples: int,
    seed: int = 0,
    include_mode: bool = True,
    vertices: bool = False,
    image_offset: int = 0,
    precision: str = "high",
) -> Hypotheses:
    """``model.hypotheses(...)``, one person at a time where that has no ``image_offset``: what
    comes depends on the seed and the person's number, not on the split into batches.

    Raises:
        ValueError: a hypothesis is not finite; names the person. Or another precision than
            ``"high"`` is asked of a model whose ``hypotheses`` takes none.
    """
    known = inspect.signature(model.hypotheses).parameters
    options: dict[str, Any] = {"include_mode": include_mode, "vertices": vertices}
    if "precision" in known:
        options["precision"] = precision
    elif precision != "high":
        raise ValueError(f"precision: {type(model).__name__} has no choice, got {precision!r}")
    if "image_offset" in known:
        answer = model.hypotheses(persons, num_samples, seed, image_offset=image_offset, **options)
    else:
        seeds = [derive_seed(seed, image_offset + row) for row in range(len(persons))]
        answer = _joined(
            [
                model.hypotheses(persons[row : row + 1], num_samples, own, **options)
                for row, own in enumerate(seeds)
            ]
        )
    lost = (~answer.joints_3d.isfinite().flatten(1).all(1)).nonzero()
    if len(lost):
        number = image_offset + int(lost[0])
        raise ValueError(f"model: its hypotheses of person {number} are not finite")
    return answer


def _joined(parts: list[Hypotheses]) -> Hypotheses:
    known = [
        name
        for name in ("log_prob", "vertices", "uncertainty")
        if getattr(parts[0], name) is not None
    ]
    return Hypotheses(
        joints_3d=torch.cat([part.joints_3d for part in parts]),
        joint_names=parts[0].joint_names,
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in known},
    )


def derive_seed(seed: int, number: int) -> int:
    """One of 2**64 seeds for each number: the finaliser of SplitMix64 (Steele et al., OOPSLA
    2014)."""
    mask = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
