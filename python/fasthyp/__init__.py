"""Fast probabilistic human pose estimation.

Conditional coupling flows, Gaussian fits to detector heatmaps and hypothesis sampling on fused CPU
and CUDA kernels, for models written with PyTorch and FrEIA. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fasthyp import _C

if TYPE_CHECKING:
    from fasthyp import body, flows, models, viz
    from fasthyp.estimator import PoseEstimate, PoseEstimator
    from fasthyp.flows.accelerate import accelerate, explain, restore
    from fasthyp.heatmaps import GaussianFit, fit_gaussians, heatmap_argmax, sample_heatmaps
    from fasthyp.mmd import MMDLoss, mmd2
    from fasthyp.sampling import HypothesisSampler

__version__: str = _C.version

_HOME = {
    "accelerate": "fasthyp.flows.accelerate",
    "explain": "fasthyp.flows.accelerate",
    "restore": "fasthyp.flows.accelerate",
    "HypothesisSampler": "fasthyp.sampling",
    "PoseEstimate": "fasthyp.estimator",
    "PoseEstimator": "fasthyp.estimator",
    "GaussianFit": "fasthyp.heatmaps",
    "fit_gaussians": "fasthyp.heatmaps",
    "heatmap_argmax": "fasthyp.heatmaps",
    "sample_heatmaps": "fasthyp.heatmaps",
    "MMDLoss": "fasthyp.mmd",
    "mmd2": "fasthyp.mmd",
}
_MODULES = ("body", "flows", "models", "viz")

__all__ = [
    "GaussianFit",
    "HypothesisSampler",
    "MMDLoss",
    "PoseEstimate",
    "PoseEstimator",
    "accelerate",
    "body",
    "explain",
    "fit_gaussians",
    "flows",
    "heatmap_argmax",
    "mmd2",
    "models",
    "restore",
    "sample_heatmaps",
    "viz",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fasthyp.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fasthyp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
