"""Colours and text of the figures: one place, so that every panel says the same thing."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.patches import Ellipse

from fasthyp.skeleton import COCO13_BONES, COCO13_JOINTS

# Okabe and Ito's palette, told apart with every kind of colour vision.
LEFT, RIGHT, CENTRE = "#D55E00", "#0072B2", "#333333"
INK, MUTED, PAPER, PAD = "#1A1A1A", "#6B6B6B", "#FFFFFF", "#ECECE8"

PALETTES = {
    "light": {
        **{"left": LEFT, "right": RIGHT, "centre": CENTRE},
        **{"ink": INK, "muted": MUTED, "paper": PAPER, "pad": PAD, "line": "#D9D9D6"},
    },
    "dark": {
        **{"left": "#E69F00", "right": "#56B4E9", "centre": "#D0D0D0"},
        **{"ink": "#F2F2F0", "muted": "#A3A3A0", "paper": "#15171A", "pad": "#1F2226"},
        "line": "#3A3E44",
    },
}
"""The same for pages that are read on a light or on a dark ground."""

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.edgecolor": "#B8B8B8",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "svg.hashsalt": "fasthyp",
}


def joint_colour(joint: int) -> str:
    """Left joints, right joints and the nose."""
    name = COCO13_JOINTS[joint]
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else CENTRE


def bone_colour(bone: tuple[int, int]) -> str:
    """A bone within one side has that side's colour, one across the body is neutral."""
    first, second = (joint_colour(joint) for joint in bone)
    return first if first == second else CENTRE


JOINT_COLOURS = [joint_colour(joint) for joint in range(len(COCO13_JOINTS))]
BONE_COLOURS = [bone_colour(bone) for bone in COCO13_BONES]


def covariance_ellipse(mean: np.ndarray, covariance: np.ndarray, std: float, **kw: Any) -> Ellipse:
    """The ellipse ``std`` standard deviations about ``mean`` (2,) for ``covariance`` (2, 2)."""
    values, vectors = np.linalg.eigh(covariance)
    width, height = 2 * std * np.sqrt(np.maximum(values, 0))
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    return Ellipse((mean[0], mean[1]), width, height, angle=angle, **kw)
