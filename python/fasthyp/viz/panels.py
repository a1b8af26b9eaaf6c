"""The panels of a figure; each draws into an axes of the caller's and returns it."""

from __future__ import annotations

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.ticker import MultipleLocator

from fasthyp.skeleton import COCO13_BONES, COCO13_JOINTS
from fasthyp.viz import style

VIEWS = {"front": (0, 1), "side": (2, 1), "top": (0, 2)}
"""Which of x (right), y (down), z (away from the camera) lie across and down."""

_BONES = np.array(COCO13_BONES)
_ELLIPSE_STD = 2.0


def draw_observation(
    ax: Axes,
    mean: np.ndarray,
    covariance: np.ndarray,
    size: tuple[int, int],
    heatmaps: np.ndarray | None = None,
    crop: np.ndarray | None = None,
    observed: np.ndarray | None = None,
) -> Axes:
    """What the detector says: picture, heatmaps and the ellipses of their Gaussians.

    Args:
        mean: (13, 2) x, y in cells.
        covariance: (13, 2, 2) cells^2; ellipses are drawn at two standard deviations.
        size: (H, W) of the map, in cells.
        heatmaps: (13, H, W), to be laid over the picture.
        crop: (h, w, 3) uint8, the picture that the map covers. Black borders are left out.
        observed: (13,) bool, the joints to draw; all by default.
    """
    height, width = size
    ax.set_facecolor(style.PAD)
    low, high = np.array([np.inf, np.inf]), np.array([-np.inf, -np.inf])
    if crop is not None:
        top, bottom, left, right = content_box(crop)
        # crop pixel k covers [k, k + 1]; cell j stands for crop position j * step
        step = np.array([crop.shape[1] / width, crop.shape[0] / height])
        low, high = np.array([left, top]) / step, np.array([right, bottom]) / step
        ax.imshow(
            faded(crop[top:bottom, left:right]),
            extent=(low[0], high[0], high[1], low[1]),
            interpolation="bicubic",
        )
    if heatmaps is not None:
        ax.imshow(
            _overlay(heatmaps),
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="bilinear",
        )
    halo: list[effects.AbstractPathEffect] = [
        effects.withStroke(linewidth=3.0, foreground="white", alpha=0.8)
    ]
    joints = range(len(COCO13_JOINTS)) if observed is None else np.flatnonzero(observed)
    for joint in joints:
        colour = style.JOINT_COLOURS[joint]
        ellipse = style.covariance_ellipse(
            mean[joint],
            covariance[joint],
            _ELLIPSE_STD,
            fill=False,
            edgecolor=colour,
            linewidth=1.5,
        )
        ellipse.set_path_effects(halo)
        ax.add_patch(ellipse)
        ax.plot(*mean[joint], "o", color=colour, markersize=4, markeredgecolor="white", zorder=4)
        reach = _ELLIPSE_STD * np.sqrt(np.diagonal(covariance[joint]))
        low, high = np.minimum(low, mean[joint] - reach), np.maximum(high, mean[joint] + reach)
    margin = 0.03 * (high - low).max()
    low, high = low - margin, high + margin
    if heatmaps is not None or crop is not None:
        low, high = np.maximum(low, -0.5), np.minimum(high, (width, height))
    truncated = crop is not None and high[1] - bottom / step[1] > 0.2 * (high[1] - low[1])
    if truncated:
        high[1] += 0.07 * (high[1] - low[1])
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if truncated:
        ax.text(
            *(0.96, 0.025, "outside the photograph"),
            transform=ax.transAxes,
            ha="right",
            fontsize=11,
            style="italic",
            color=style.MUTED,
        )
    return ax


def draw_hypotheses(
    ax: Axes,
    mode: np.ndarray,
    hypotheses: np.ndarray,
    covariance: np.ndarray | None = None,
    view: str = "front",
) -> Axes:
    """The mode as a stick figure over the cloud of hypotheses, axes in mm with one scale.

    Args:
        mode: (13, 3) mm, camera axes.
        hypotheses: (M, 13, 3) mm.
        covariance: (13, 3, 3) mm^2 of the hypotheses; adds ellipses of two standard deviations
            about the hypotheses' mean.
        view: ``"front"`` as the camera sees it, ``"side"`` or ``"top"``.
    """
    if view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
    plane = list(VIEWS[view])
    cloud, pose = hypotheses[..., plane], mode[:, plane]

    # All bones of one hypothesis before the next, so that no colour ends up on top.
    opacity = float(np.clip(18 / max(len(cloud), 1), 0.012, 0.5))
    bones = cloud[:, _BONES].reshape(-1, 2, 2)
    lines = LineCollection(
        list(bones), colors=style.BONE_COLOURS * len(cloud), linewidths=0.7, alpha=opacity
    )
    lines.set_rasterized(True)
    ax.add_collection(lines)
    dots = cloud.reshape(-1, 2)
    ax.scatter(
        dots[:, 0],
        dots[:, 1],
        s=3,
        c=style.JOINT_COLOURS * len(cloud),
        alpha=min(1.0, 5 * opacity),
        linewidths=0,
        rasterized=True,
    )
    if covariance is not None:
        for joint, centre in enumerate(cloud.mean(0)):
            ellipse = style.covariance_ellipse(
                centre,
                covariance[joint][np.ix_(plane, plane)],
                _ELLIPSE_STD,
                fill=False,
                edgecolor=style.JOINT_COLOURS[joint],
                linewidth=1.1,
                linestyle=(0, (4, 2)),
                zorder=3,
            )
            ax.add_patch(ellipse)
    halo = [effects.withStroke(linewidth=6.5, foreground="white")]
    for bone, colour in zip(COCO13_BONES, style.BONE_COLOURS, strict=True):
        ax.plot(
            *pose[list(bone)].T,
            color=colour,
            linewidth=3.6,
            solid_capstyle="round",
            path_effects=halo,
            zorder=4,
        )
    ax.scatter(
        pose[:, 0],
        pose[:, 1],
        s=52,
        c=style.JOINT_COLOURS,
        edgecolors="white",
        linewidths=1.4,
        zorder=5,
    )
    ax.set(aspect="equal")
    ax.grid(True)
    depth = "depth, away from the camera (mm)"
    ax.set_xlabel({0: "to the right in the image (mm)", 2: depth}[plane[0]])
    ax.set_ylabel({1: "height above the hips (mm)", 2: depth}[plane[1]])
    if plane[1] == 1:
        ax.yaxis.set_major_formatter(lambda y, _: f"{-round(y)}".replace("-", "\N{MINUS SIGN}"))
    ax.xaxis.set_major_locator(MultipleLocator(200))
    ax.yaxis.set_major_locator(MultipleLocator(200))
    return ax


def draw_uncertainty(ax: Axes, covariance: np.ndarray) -> Axes:
    """How far the hypotheses of each joint lie from their mean, in the image and in depth.

    Args:
        covariance: (13, 3, 3) mm^2, camera axes.
    """
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    total = np.sqrt(variance.sum(1))
    depth = np.sqrt(variance[:, 2])
    rows = _rows()
    for joint, y in rows.items():
        colour = style.JOINT_COLOURS[joint]
        ax.barh(y, total[joint], 0.36, color=colour, alpha=0.28, linewidth=0)
        ax.barh(y, depth[joint], 0.36, color=colour, linewidth=0)
        ax.annotate(
            f"{total[joint]:.0f}",
            (total[joint], y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=style.INK,
        )
    names: dict[str, list[float]] = {}
    for joint, y in rows.items():
        names.setdefault(COCO13_JOINTS[joint].split("_")[-1], []).append(y)
    ax.set_yticks([float(np.mean(y)) for y in names.values()], list(names))
    ax.tick_params(axis="y", length=0, labelsize=12, labelcolor=style.INK)
    ax.set(xlim=(0, 1.16 * max(total.max(), 1.0)), ylim=(max(rows.values()) + 0.5, -0.5))
    ax.set_xlabel("RMS distance from the mean (mm)\ndark: along the line of sight")
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)
    return ax


def limits(
    mode: np.ndarray, hypotheses: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Range (3,), (3,) in mm that shows the mode, the ellipses and nearly all hypotheses.

    Args:
        mode: (13, 3) mm. hypotheses: (M, 13, 3) mm. covariance: (13, 3, 3) mm^2.
    """
    mean = hypotheses.mean(0)
    reach = 1.1 * _ELLIPSE_STD * np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    low = np.minimum(mode.min(0), (mean - reach).min(0))
    high = np.maximum(mode.max(0), (mean + reach).max(0))
    margin = 0.03 * (high - low).max()
    return low - margin, high + margin


def _rows() -> dict[int, float]:
    """Where each joint's bar is: left above right, pairs apart from each other."""
    rows, y = {}, 0.0
    for joint, name in enumerate(COCO13_JOINTS):
        rows[joint] = y
        y += 0.42 if name.startswith("left") else 0.85
    return rows


def content_box(crop: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns [top, bottom), [left, right) that are not wholly (almost) black."""
    light = crop.max(-1) > 12
    rows, columns = np.flatnonzero(light.any(1)), np.flatnonzero(light.any(0))
    if not len(rows):
        return 0, crop.shape[0], 0, crop.shape[1]
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def faded(crop: np.ndarray) -> np.ndarray:
    """Less colour and more light, so that what is laid over it can be seen."""
    colour = crop.astype(np.float64) / 255
    grey = colour @ [0.299, 0.587, 0.114]
    return 0.25 + 0.75 * (0.3 * colour + 0.7 * grey[..., None])


def _overlay(heatmaps: np.ndarray) -> np.ndarray:
    """Heatmaps (13, H, W) as one RGBA picture in the joints' colours."""
    heat = np.nan_to_num(heatmaps.astype(np.float64), posinf=0, neginf=0).clip(0)
    heat = heat / max(heat.max(), 1e-12)
    colours = np.array([to_rgb(colour) for colour in style.JOINT_COLOURS])
    weight = heat.sum(0)
    rgb = np.einsum("jhw,jc->hwc", heat, colours) / np.maximum(weight, 1e-12)[..., None]
    strength = heat.max(0)
    opacity = 0.85 * np.sqrt(strength) * np.clip((strength - 0.04) / 0.16, 0, 1)
    return np.concatenate([rgb, opacity[..., None]], -1).clip(0, 1)
