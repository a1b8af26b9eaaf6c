"""What every model of persons answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
    ) -> Hypotheses:
        """Hypotheses of persons; the first is the mode with ``include_mode``. The same seed gives
        the same hypotheses, and the first of them whatever their number."""
        ...
