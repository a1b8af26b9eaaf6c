"""Networks of published systems, and one that is ready to run."""

from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.poco import POCO, POCOConfig
from fasthyp.models.pose_inn import PoseINN
from fasthyp.models.propose import ProPose, ProPoseConfig

__all__ = ["POCO", "LiftingFlow", "POCOConfig", "PoseINN", "ProPose", "ProPoseConfig"]
