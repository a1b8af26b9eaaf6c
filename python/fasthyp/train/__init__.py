"""Training and evaluation of the models in `fasthyp.models`."""

from fasthyp.train.evaluation import evaluate_lifting
from fasthyp.train.lifting import LiftingTrainConfig

__all__ = ["LiftingTrainConfig", "evaluate_lifting"]
