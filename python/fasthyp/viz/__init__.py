"""Pictures of poses, hypotheses and their uncertainty."""

from fasthyp.viz.figure import figure_format, pose_figure, save_figure
from fasthyp.viz.meshes import draw_mesh, mesh_figure
from fasthyp.viz.panels import draw_hypotheses, draw_observation, draw_uncertainty, limits
from fasthyp.viz.viewer import write_viewer

__all__ = [
    "draw_hypotheses",
    "draw_mesh",
    "draw_observation",
    "draw_uncertainty",
    "figure_format",
    "limits",
    "mesh_figure",
    "pose_figure",
    "save_figure",
    "write_viewer",
]
