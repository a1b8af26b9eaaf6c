"""The picture of one person: what was seen, what it can mean, and how sure that is."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fasthyp.skeleton import COCO13_JOINTS
from fasthyp.viz import panels, style

if TYPE_CHECKING:
    from fasthyp.observations import Observations
    from fasthyp.pipeline import PoseHypotheses


_WIDTH, _LEFT, _TALLEST = 16.0, 0.5, 5.8  # inches


def pose_figure(
    result: PoseHypotheses,
    observations: Observations,
    person: int = 0,
    title: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """The 2D evidence, the hypotheses from the front and from the side, and their spread.

    Does not touch pyplot or the backend in use.

    Args:
        result: of :func:`fasthyp.pipeline.estimate`.
        observations: what it was estimated from.
        person: which one.
        title, subtitle: a line each above the panels; by default the numbers of hypotheses, and
            the surest and the least sure joint.

    Raises:
        ValueError: there is no such person.
    """
    seen = observations.person(person)
    hypotheses, mode = result.hypotheses[person], result.mode[person]
    covariance = result.covariance[person]
    with matplotlib.rc_context(style.RC):
        figure = Figure(dpi=140)
        FigureCanvasAgg(figure)
        seen_ax, front, side, bars = (figure.add_axes((0, 0, 1, 1)) for _ in range(4))

        panels.draw_observation(
            seen_ax,
            result.gaussians.mean[person].numpy(),
            result.gaussians.covariance[person].numpy(),
            observations.size,
            None if seen.heatmaps is None else seen.heatmaps[0].numpy(),
            None if seen.crop is None else seen.crop[0],
            result.observed[person],
        )
        low, high = panels.limits(mode, hypotheses, covariance)
        for ax, view, x in ((front, "front", 0), (side, "side", 2)):
            panels.draw_hypotheses(ax, mode, hypotheses, covariance, view)
            ax.set(xlim=(low[x], high[x]), ylim=(high[1], low[1]))
        side.set_ylabel("")
        side.tick_params(axis="y", labelleft=False, length=0)
        panels.draw_uncertainty(bars, covariance)
        _arrange(figure, [seen_ax, front, side], bars)
        titles = ("What the detector sees", "From the front", "From the side", "Spread per joint")
        for ax, text in zip((seen_ax, front, side, bars), titles, strict=True):
            ax.set_title(text, pad=10)

        texts = (
            (title or _title(result), 22, style.INK),
            (subtitle or _subtitle(result, person), 14, style.MUTED),
        )
        for (text, size, colour), y in zip(texts, (0.63, 1.08), strict=True):
            figure.text(
                _LEFT / _WIDTH,
                1 - y / figure.get_figheight(),
                text,
                fontsize=size,
                color=colour,
                weight="bold" if size > 20 else None,
            )
        _legend(figure)
    return figure


def save_figure(figure: Figure, file: IO[bytes], format: str = "png") -> None:
    """Write a figure in one of matplotlib's formats, without the date and so always the same."""
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(format)
    with matplotlib.rc_context(style.RC):
        figure.savefig(file, format=format, metadata=metadata)


def figure_format(path: str) -> str:
    """The format that a file name asks for; ValueError if matplotlib has no such format."""
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    suffix = path.rpartition(".")[2].lower() if "." in path else ""
    if suffix not in known:
        raise ValueError(f"{path}: expected a picture's name that ends in .{', .'.join(known)}")
    return suffix


def _title(result: PoseHypotheses) -> str:
    return f"{result.hypotheses.shape[1]:,} hypotheses of one person's pose"


def _subtitle(result: PoseHypotheses, person: int) -> str:
    std = result.std[person]
    surest, least = (
        COCO13_JOINTS[joint].replace("_", " ") for joint in (std.argmin(), std.argmax())
    )
    return (
        f"Spread from {std.min():.0f} mm ({surest}) to {std.max():.0f} mm ({least}), "
        "relative to the middle of the hips"
    )


def _arrange(figure: Figure, pictures: list[Axes], bars: Axes) -> None:
    """Panels side by side, as high as the width allows; the bars take what is left."""
    above, below, gaps, least = 1.75, 1.45, (0.95, 0.4, 1.15), 2.5
    ratios = [float(abs(np.diff(ax.get_xlim()) / np.diff(ax.get_ylim())).item()) for ax in pictures]
    tall = min(_TALLEST, (_WIDTH - 2 * _LEFT - sum(gaps) - least) / sum(ratios))
    height = below + tall + above
    figure.set_size_inches(_WIDTH, height)
    x = _LEFT
    for ax, ratio, gap in zip(pictures, ratios, gaps, strict=True):
        ax.set_position((x / _WIDTH, below / height, tall * ratio / _WIDTH, tall / height))
        x += tall * ratio + gap
    bars.set_position((x / _WIDTH, below / height, 1 - (x + _LEFT) / _WIDTH, tall / height))


def _legend(figure: Figure) -> None:
    sides = (("left side", style.LEFT), ("right side", style.RIGHT), ("centre", style.CENTRE))
    entries = [
        *(Line2D([], [], color=colour, lw=5, label=label) for label, colour in sides),
        Line2D(
            [], [], color=style.MUTED, lw=3.6, marker="o", ms=7, mec="white", label="mode (z = 0)"
        ),
        Line2D([], [], color=style.MUTED, lw=0.8, marker="o", ms=3, alpha=0.6, label="hypotheses"),
        Line2D([], [], color=style.MUTED, lw=1.4, ls=(0, (4, 2)), label="2 standard deviations"),
    ]
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(0.022, 0.22 / figure.get_figheight()),
        ncols=len(entries),
        frameon=False,
        fontsize=12,
        handlelength=1.8,
        columnspacing=2.2,
        labelcolor=style.INK,
    )
