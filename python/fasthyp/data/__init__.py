"""Motion capture and the simulated detector that turns it into training pairs."""

from fasthyp.data.mocap import MocapPoses, load_cmu
from fasthyp.data.simulate import PoseSimulator, SimulatedBatch, SimulationConfig

__all__ = ["MocapPoses", "PoseSimulator", "SimulatedBatch", "SimulationConfig", "load_cmu"]
