"""Networks of published systems, and one that is ready to run."""

from fasthyp.models.lifting import LiftingFlow
from fasthyp.models.pose_inn import PoseINN

__all__ = ["LiftingFlow", "PoseINN"]
