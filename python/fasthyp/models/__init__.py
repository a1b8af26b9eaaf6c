"""Networks of published systems, and one that is ready to run."""

from fasthyp.models._load import load
from fasthyp.models.flow_model import BodyJoints, BodyPrediction
from fasthyp.models.humr import HUMR
from fasthyp.models.hypotheses import Hypotheses, Hypothesiser
from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.pose_inn import PoseINN
from fasthyp.models.prohmr import ProHMR, ProHMRLifting
from fasthyp.models.regression import Regression

__all__ = [
    "HUMR",
    "BodyJoints",
    "BodyPrediction",
    "Hypotheses",
    "Hypothesiser",
    "LiftingFlow",
    "PoseINN",
    "ProHMR",
    "ProHMRLifting",
    "Regression",
    "load",
]
