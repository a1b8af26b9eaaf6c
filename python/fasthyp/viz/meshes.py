"""The picture of hypotheses as meshes, coloured by how far they differ."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from fasthyp.body.meshes import vertex_spread
from fasthyp.viz import style

_COLOURS = "viridis"  # ordered in lightness too, for every kind of colour vision
_HEIGHT = 4.6  # inches, of a panel


def mesh_figure(
    vertices: Tensor,
    faces: Tensor | np.ndarray,
    uncertainty: Tensor | None = None,
    shown: int = 4,
    up: Sequence[float] = (0, 1, 0),
    front: Sequence[float] = (0, 0, 1),
    title: str | None = None,
) -> Figure:
    """The mean of the hypotheses from the front and from the side, and some of them.

    Does not touch pyplot or the backend in use.

    Args:
        vertices: (M, V, 3) m, hypotheses of one body.
        faces: (F, 3) vertices of each triangle.
        uncertainty: (V,) m, the colour; by default how far the hypotheses of a vertex lie from
            their mean.
        shown: how many hypotheses to draw beside the mean.
        up, front: directions (3,) of the body's up and of where it faces; of SMPL by default, for
            Anny ``(0, 0, 1)`` and ``(0, -1, 0)``.
        title: a line above the panels.

    Raises:
        ValueError: an argument of another shape, or directions that are not at right angles.
    """
    spread = vertex_spread(vertices) if uncertainty is None else uncertainty
    if tuple(spread.shape) != (vertices.shape[-2],):
        raise ValueError(
            f"uncertainty: expected shape ({vertices.shape[-2]},), got {tuple(spread.shape)}"
        )
    if shown < 0:
        raise ValueError(f"shown: expected none or more, got {shown}")
    vertical, facing = (np.asarray(d, np.float64) for d in (up, front))
    lengths = np.linalg.norm(vertical), np.linalg.norm(facing)
    if min(lengths) == 0 or abs(vertical @ facing) > 1e-6 * lengths[0] * lengths[1]:
        raise ValueError(f"front: expected a direction at right angles to up, got {tuple(front)}")
    vertical, facing = vertical / lengths[0], facing / lengths[1]
    across = np.cross(vertical, facing)
    points = vertices.detach().cpu().double().numpy()
    triangles = faces.cpu().numpy() if isinstance(faces, Tensor) else np.asarray(faces)
    values = 1000 * spread.detach().cpu().double().numpy()
    scale = Normalize(0, max(float(values.max()), 1e-9))
    chosen = points[:shown]
    mean = points.mean(0)
    panels = [
        ("Mean, front", mean, np.stack([across, vertical, facing])),
        ("Mean, side", mean, np.stack([-facing, vertical, across])),
        *(
            (f"Hypothesis {k + 1}", body, np.stack([across, vertical, facing]))
            for k, body in enumerate(chosen)
        ),
    ]
    with matplotlib.rc_context(style.RC):
        projected = [body @ view.T for _, body, view in panels]
        sizes = [np.ptp(p[:, 0]) for p in projected]
        low, high = (
            min(p[:, 1].min() for p in projected),
            max(p[:, 1].max() for p in projected),
        )
        ratios = np.array([1.15 * max(size, 0.4 * (high - low)) for size in sizes])
        figure = Figure(
            figsize=(_HEIGHT * ratios.sum() / (high - low) + 1.2, _HEIGHT + 0.9), dpi=140
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            1, len(panels) + 1, width_ratios=[*ratios, 0.02 * ratios.sum()],
            left=0.02, right=0.93, bottom=0.04, top=0.86, wspace=0.04,
        )  # fmt: skip
        for k, ((name, _, _), flat) in enumerate(zip(panels, projected, strict=True)):
            ax = figure.add_subplot(grid[k])
            draw_mesh(ax, flat, triangles, values, scale)
            middle = (flat[:, 0].min() + flat[:, 0].max()) / 2
            half = ratios[k] / 2
            ax.set(xlim=(middle - half, middle + half), ylim=(low, high))
            ax.set_title(name, fontsize=11)
        bar = figure.colorbar(
            ScalarMappable(scale, _COLOURS), cax=figure.add_subplot(grid[len(panels)])
        )
        bar.set_label("RMS distance from the mean (mm)")
        bar.outline.set_visible(False)
        text = title or f"{len(points):,} hypotheses of one body"
        figure.text(0.02, 0.94, text, fontsize=16, color=style.INK, weight="bold")
    return figure


def draw_mesh(
    ax: Axes, points: np.ndarray, faces: np.ndarray, values: np.ndarray, scale: Normalize
) -> Axes:
    """A mesh in parallel projection, farthest triangles first.

    Args:
        points: (V, 3), to the right, up, and towards the viewer.
        faces: (F, 3). values: (V,), coloured by ``scale``.
    """
    corners = points[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normal, axis=1)
    # lit from the viewer, from both sides alike, as the winding of a mesh may be either
    light = 0.45 + 0.55 * np.abs(normal[:, 2]) / np.maximum(length, 1e-12)
    colours = matplotlib.colormaps[_COLOURS](scale(values[faces].mean(1)))
    colours[:, :3] *= light[:, None]
    order = np.argsort(corners[:, :, 2].mean(1), kind="stable")
    mesh = PolyCollection(
        list(corners[order][:, :, :2]), facecolors=colours[order], edgecolors=colours[order],
        linewidths=0.2, rasterized=True,
    )  # fmt: skip
    ax.add_collection(mesh)
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax
