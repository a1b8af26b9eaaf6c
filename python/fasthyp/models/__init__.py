"""Networks of published systems, and one that is ready to run."""

from fasthyp.models._load import load
from fasthyp.models.flow_model import BodyJoints, BodyPrediction
from fasthyp.models.humr import HUMR
from fasthyp.models.hypotheses import Hypotheses, Hypothesiser
from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.poco import POCO, POCOConfig
from fasthyp.models.pose_inn import PoseINN
from fasthyp.models.prohmr import ProHMR, ProHMRLifting
from fasthyp.models.propose import ProPose, ProPoseConfig
from fasthyp.models.regression import Regression

__all__ = [
    "HUMR",
    "POCO",
    "BodyJoints",
    "BodyPrediction",
    "Hypotheses",
    "Hypothesiser",
    "LiftingFlow",
    "POCOConfig",
    "PoseINN",
    "ProHMR",
    "ProHMRLifting",
    "ProPose",
    "ProPoseConfig",
    "Regression",
    "load",
]
