"""Networks of published systems, and one that is ready to run."""

from fasthyp.models._load import load
from fasthyp.models.hypotheses import Hypotheses, Hypothesiser
from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.pose_inn import PoseINN
from fasthyp.models.regression import Regression

__all__ = ["Hypotheses", "Hypothesiser", "LiftingFlow", "PoseINN", "Regression", "load"]
