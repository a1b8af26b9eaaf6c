"""The picture: it shows the numbers it is given, in one scale, and leaves the backend alone."""

from __future__ import annotations

import io
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.text import Text

from fasthyp.observations import Gaussians, Observations
from fasthyp.pipeline import PoseHypotheses
from fasthyp.skeleton import COCO13_BONES, COCO13_JOINTS
from fasthyp.viz import draw_hypotheses, draw_observation, figure_format, pose_figure, save_figure
from fasthyp.viz.style import CENTRE, LEFT, RIGHT, bone_colour, covariance_ellipse, joint_colour
from tests.synthetic import people


def example(samples: int = 30, persons: int = 2) -> tuple[PoseHypotheses, Observations]:
    """Hypotheses whose joint j is 10 (j + 1) mm uncertain in depth, half that in the image."""
    rng = np.random.default_rng(0)
    mode = 1000 * people(persons)[..., [1, 2, 0]].numpy() * [1, -1, 1]
    sigma = 10.0 * np.arange(1, 14)[:, None] * [0.5, 0.5, 1.0]
    noise = rng.standard_normal((persons, samples, 13, 3))
    hypotheses = mode[:, None] + sigma * noise
    centred = hypotheses - hypotheses.mean(1, keepdims=True)
    covariance = np.einsum("pmjx,pmjy->pjxy", centred, centred) / samples
    mean = torch.from_numpy(mode[..., :2] / 60 + 32).float()
    gaussians = Gaussians(
        torch.ones(persons, 13), mean, (2.0 * torch.eye(2)).expand(persons, 13, 2, 2)
    )
    cells = torch.arange(64.0)
    dx, dy = (cells - mean[..., :1])[..., None, :], (cells - mean[..., 1:])[..., :, None]
    crop = np.zeros((persons, 128, 128, 3), np.uint8)
    crop[:, 10:70, 20:100] = 120
    observations = Observations(heatmaps=torch.exp(-(dx**2 + dy**2) / 4), crop=crop)
    result = PoseHypotheses(
        hypotheses=hypotheses,
        log_prob=np.zeros((persons, samples)),
        mode=mode,
        std=np.sqrt(np.trace(covariance, axis1=2, axis2=3)),
        covariance=covariance,
        gaussians=gaussians,
        fit=None,
        observed=np.ones((persons, 13), bool),
        seed=0,
    )
    return result, observations


def test_panels_and_numbers() -> None:
    result, observations = example()
    figure = pose_figure(result, observations, person=1)
    seen, front, side, bars = figure.axes
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [
        "What the detector sees",
        "From the front",
        "From the side",
        "Spread per joint",
    ]
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "30 hypotheses of one person's pose"
    assert f"to {result.std[1].max():.0f} mm (right ankle)" in texts[1]

    assert len([p for p in seen.patches if isinstance(p, Ellipse)]) == 13
    assert len(seen.images) == 2
    assert "outside the photograph" in [text.get_text() for text in seen.texts]
    for ax in (front, side):
        cloud = next(c for c in ax.collections if isinstance(c, LineCollection))
        assert len(cloud.get_segments()) == 30 * len(COCO13_BONES)
        assert len(ax.patches) == 13
        assert ax.get_aspect() == 1
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # y is down
    x, y = front.lines[0].get_data()
    bone = list(COCO13_BONES[0])
    np.testing.assert_allclose([x, y], result.mode[1][bone][:, :2].T)
    np.testing.assert_allclose(side.lines[0].get_xdata(), result.mode[1][bone][:, 2])
    labels = [text.get_text() for text in bars.texts]
    assert labels == [f"{std:.0f}" for std in result.std[1]]


def test_front_and_side_have_one_scale_and_do_not_overlap() -> None:
    figure = pose_figure(*example())
    save_figure(figure, io.BytesIO())  # aspect is settled when drawn
    boxes = [ax.get_position() for ax in figure.axes]
    front, side = figure.axes[1:3]
    scales = [
        np.ptp(ax.get_xlim()) / (box.width * figure.get_figwidth())
        for ax, box in zip((front, side), boxes[1:3], strict=True)
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)
    assert front.get_ylim() == side.get_ylim()
    for left, right in pairwise(boxes):
        assert left.x1 < right.x0
    assert boxes[0].x0 > 0
    assert boxes[-1].x1 < 1


def test_all_text_is_inside_and_apart() -> None:
    figure = pose_figure(*example())
    save_figure(figure, io.BytesIO())
    shown: list[Text] = [*figure.texts, *figure.legends[0].get_texts()]
    for ax in figure.axes:
        shown += [*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label]  # type: ignore[attr-defined]
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            if axis.get_tick_params().get("labelleft", True):
                # labels of ticks beyond the limits exist but are not drawn
                place = 0 if axis is ax.xaxis else 1
                labels = axis.get_ticklabels()
                shown += [
                    t for t in labels if min(limits) <= t.get_position()[place] <= max(limits)
                ]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown if text.get_text()]
    assert len(boxes) > 45
    for (name, box), (other_name, other) in combinations(boxes, 2):
        assert not box.overlaps(other), (name, other_name)
    for name, box in boxes:
        assert (box.min >= figure.bbox.min).all(), name
        assert (box.max <= figure.bbox.max).all(), name


def test_the_backend_and_settings_stay_the_users() -> None:
    before = dict(matplotlib.rcParams)
    result, observations = example(5, 1)
    figure = pose_figure(result, observations, title="A title", subtitle="and another")
    assert [text.get_text() for text in figure.texts] == ["A title", "and another"]
    first, second = io.BytesIO(), io.BytesIO()
    save_figure(figure, first)
    save_figure(pose_figure(result, observations, title="A title", subtitle="and another"), second)
    assert first.getvalue() == second.getvalue()
    assert dict(matplotlib.rcParams) == before


def test_other_inputs() -> None:
    """One hypothesis, no picture, an unseen joint, an all black picture."""
    result, observations = example(1, 1)
    result.observed[0, 3] = False
    bare = Observations(gaussians=result.gaussians)
    assert len(pose_figure(result, bare).axes[0].patches) == 12
    assert observations.crop is not None
    observations.crop[:] = 0
    save_figure(pose_figure(result, observations), io.BytesIO(), "svg")
    with pytest.raises(ValueError, match="person: expected 0 to 0, got 1"):
        pose_figure(result, observations, person=1)


def test_colours_tell_the_sides_apart() -> None:
    assert {joint_colour(j) for j, n in enumerate(COCO13_JOINTS) if "left" in n} == {LEFT}
    assert {joint_colour(j) for j, n in enumerate(COCO13_JOINTS) if "right" in n} == {RIGHT}
    assert bone_colour((7, 9)) == LEFT
    assert bone_colour((1, 2)) == CENTRE


def test_ellipse_has_the_covariance() -> None:
    covariance = np.array([[9.0, 4.0], [4.0, 5.0]])
    ellipse = covariance_ellipse(np.array([1.0, 2.0]), covariance, 2.0)
    points = ellipse.get_transform().transform(ellipse.get_path().vertices) - [1.0, 2.0]
    distance = np.einsum("ni,ij,nj->n", points, np.linalg.inv(covariance), points)
    on_curve = np.isclose(np.linalg.norm(ellipse.get_path().vertices, axis=1), 1)
    np.testing.assert_allclose(distance[on_curve], 4.0, rtol=1e-6)


def test_a_heatmap_without_a_picture_is_drawn_where_it_is() -> None:
    result, observations = example(5, 1)
    assert observations.heatmaps is not None
    ax = Figure().add_subplot()
    gaussians = result.gaussians
    draw_observation(
        ax,
        gaussians.mean[0].numpy(),
        gaussians.covariance[0].numpy(),
        (64, 64),
        observations.heatmaps[0].numpy(),
    )
    overlay = np.asarray(ax.images[0].get_array())
    assert tuple(ax.images[0].get_extent()) == (-0.5, 63.5, 63.5, -0.5)
    x, y = gaussians.mean[0, 0].round().int().tolist()
    assert overlay[y, x, 3] > 0.7
    assert overlay[0, 0, 3] == 0


def test_formats() -> None:
    assert figure_format("a.b/c.PNG") == "png"
    assert figure_format("x.pdf") == "pdf"
    for name in ("x", "x.npz", "png"):
        with pytest.raises(ValueError, match=r"expected a picture's name that ends in"):
            figure_format(name)


def test_refuses_an_unknown_view() -> None:
    with pytest.raises(ValueError, match="view: expected one of front, side, top, got 'back'"):
        draw_hypotheses(
            Figure().add_subplot(), np.zeros((13, 3)), np.zeros((1, 13, 3)), view="back"
        )
