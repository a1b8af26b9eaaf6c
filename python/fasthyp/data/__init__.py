"""Persons: motion capture, the simulated detector that turns it into training data, batches."""

from fasthyp.data.gaussian_features import gaussian_features, standard_features
from fasthyp.data.mocap import MocapPoses, load_cmu
from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulate import PoseSimulator, SimulatedBatch, SimulationConfig
from fasthyp.data.simulated_persons import (
    DETECTORS,
    PersonSource,
    SimulatedPersons,
    StickPoses,
    render_gaussians,
    simulate_persons,
    stick_poses,
)
from fasthyp.data.stored_persons import StoredPersons

__all__ = [
    "DETECTORS",
    "MocapPoses",
    "PersonBatch",
    "PersonSource",
    "PoseSimulator",
    "SimulatedBatch",
    "SimulatedPersons",
    "SimulationConfig",
    "StickPoses",
    "StoredPersons",
    "gaussian_features",
    "load_cmu",
    "render_gaussians",
    "simulate_persons",
    "standard_features",
    "stick_poses",
]
