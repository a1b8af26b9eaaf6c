"""Networks of published systems, and one that is ready to run."""

from fasthyp.models.flow_model import BodyJoints, BodyPrediction
from fasthyp.models.humr import HUMR
from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.poco import POCO, POCOConfig
from fasthyp.models.pose_inn import PoseINN
from fasthyp.models.prohmr import ProHMR, ProHMRLifting
from fasthyp.models.propose import ProPose, ProPoseConfig

__all__ = [
    "HUMR",
    "POCO",
    "BodyJoints",
    "BodyPrediction",
    "LiftingFlow",
    "POCOConfig",
    "PoseINN",
    "ProHMR",
    "ProHMRLifting",
    "ProPose",
    "ProPoseConfig",
]
