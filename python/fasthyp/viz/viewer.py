"""A page to look at hypotheses in a browser: one file that asks for nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.image import imsave

from fasthyp._files import replacing
from fasthyp.skeleton import (
    COCO13_BONES,
    COCO13_JOINTS,
    H36M17_JOINTS,
    SMPL24_JOINTS,
    SMPL_PARENTS,
)
from fasthyp.viz import panels, style

if TYPE_CHECKING:
    from fasthyp.observations import Observations

_STEPS = 65535  # of the 16 bits of a coordinate
_H36M17_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)


def write_viewer(
    path: str | os.PathLike[str],
    hypotheses: np.ndarray,
    *,
    log_prob: np.ndarray | None = None,
    mode: np.ndarray | None = None,
    fit_mean: np.ndarray | None = None,
    fit_covariance: np.ndarray | None = None,
    observations: Observations | None = None,
    joint_names: Sequence[str] = COCO13_JOINTS,
    bones: Sequence[tuple[int, int]] | None = None,
    first: int = 0,
    title: str = "Pose hypotheses",
) -> None:
    """Write hypotheses of P persons as a self-contained HTML page.

    The page holds the numbers: coordinates of hypotheses as 16 bits between the least and the
    greatest of their person and axis, so off by at most 1 / 131070 of that range (0.015 mm of
    2 m) and float32's rounding; heatmaps as 8 bits of their joint's peak, so off by at most
    1 / 510 of it; log-probabilities as float32. It draws with WebGL and needs no connection.

    Args:
        path: what to write, ``.html``; it appears whole or not at all.
        hypotheses: (P, M, J, 3) mm, x right, y down, z away from the camera.
        log_prob: (P, M) nats; the page sorts by it.
        mode: (P, J, 3) mm.
        fit_mean: (P, J, 2) x, y of the Gaussians fitted to the heatmaps, in cells; not-a-number
            where there is none.
        fit_covariance: (P, J, 2, 2) cells^2.
        observations: heatmaps and picture of the same persons; the joints must be COCO's 13.
        joint_names: J names; those that begin with left and right are coloured so.
        bones: pairs of joints to join; by default those of COCO's 13, Human3.6M's 17 or SMPL's
            joints, and none for others.
        first: number of the first person, as shown.
        title: of the page.

    Raises:
        ValueError: an array of another shape, or numbers that are not finite.
        OSError: the file cannot be written.
    """
    poses = _array("hypotheses", hypotheses, (None, None, None, 3))
    persons, samples, joints = poses.shape[:3]
    if 0 in poses.shape:
        raise ValueError(f"hypotheses: expected at least one, got shape {poses.shape}")
    names = [str(name) for name in joint_names]
    if len(names) != joints:
        raise ValueError(f"joint_names: expected {joints} names, got {len(names)}")
    if bones is None:
        bones = _known_bones(names)
    for bone in bones:
        if len(bone) != 2 or not all(0 <= joint < joints for joint in bone):
            raise ValueError(f"bones: expected pairs of 0 to {joints - 1}, got {tuple(bone)}")
    if log_prob is not None:
        log_prob = _array("log_prob", log_prob, (persons, samples))
    if mode is not None:
        mode = _array("mode", mode, (persons, joints, 3))
    if (fit_mean is None) != (fit_covariance is None):
        raise ValueError("fit_mean and fit_covariance: expected both or neither")
    if fit_mean is not None:
        fit_mean = _array("fit_mean", fit_mean, (persons, joints, 2), finite=False)
        fit_covariance = _array(
            "fit_covariance", fit_covariance, (persons, joints, 2, 2), finite=False
        )
    if observations is not None:
        if len(observations) != persons:
            raise ValueError(f"observations: expected {persons} persons, got {len(observations)}")
        if tuple(names) != COCO13_JOINTS:
            raise ValueError(f"observations: expected hypotheses of COCO's 13 joints, got {names}")

    def one(person: int) -> dict[str, Any]:
        record: dict[str, Any] = {"number": first + person, **_spread(poses[person])}
        if log_prob is not None:
            record["logProb"] = _base64(log_prob[person].astype("<f4"))
        if mode is not None:
            record["mode"] = mode[person].ravel().tolist()
        if fit_mean is not None and fit_covariance is not None:
            record["fit"] = _fit(fit_mean[person], fit_covariance[person])
        if observations is not None:
            record |= _seen(observations, person)
        return record

    content = {
        "joints": names,
        "bones": [list(map(int, bone)) for bone in bones],
        "hypotheses": samples,
        "persons": [one(person) for person in range(persons)],
    }
    page = _page(title, content)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _array(name: str, values: Any, shape: tuple[int | None, ...], finite: bool = True) -> Any:
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        letters = iter("PMJ")
        expected = ", ".join(next(letters) if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers")
    return array


def _known_bones(names: list[str]) -> list[tuple[int, int]]:
    if tuple(names) == COCO13_JOINTS:
        return list(COCO13_BONES)
    for known, parents in ((H36M17_JOINTS, _H36M17_PARENTS), (SMPL24_JOINTS, SMPL_PARENTS)):
        if tuple(names) in (known, known[:22]):
            return [(parents[joint], joint) for joint in range(1, len(names))]
    return []


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _spread(poses: np.ndarray) -> dict[str, Any]:
    """Hypotheses (M, J, 3) in 16 bits, their mean and their covariance."""
    low = poses.min((0, 1))
    step = (poses.max((0, 1)) - low) / _STEPS
    codes = np.round((poses - low) / np.where(step > 0, step, 1))
    mean = poses.mean(0)
    centred = poses - mean
    covariance = np.einsum("mjx,mjy->jxy", centred, centred) / len(poses)
    return {
        "low": low.tolist(),
        "step": step.tolist(),
        "poses": _base64(codes.astype("<u2")),
        "mean": mean.ravel().tolist(),
        "covariance": covariance.ravel().tolist(),
    }


def _fit(mean: np.ndarray, covariance: np.ndarray) -> list[dict[str, list[float]] | None]:
    return [
        {"mean": m.tolist(), "covariance": c.ravel().tolist()}
        if np.isfinite(m).all() and np.isfinite(c).all()
        else None
        for m, c in zip(mean, covariance, strict=True)
    ]


def _seen(observations: Observations, person: int) -> dict[str, Any]:
    """Heatmaps, and the picture without its black borders at its place in cells."""
    if observations.heatmaps is None:
        return {}
    maps = np.nan_to_num(observations.heatmaps[person].numpy().astype(np.float64))
    maps = np.clip(maps, 0, None)
    peak = maps.max((1, 2))
    codes = np.round(255 * maps / np.where(peak > 0, peak, 1)[:, None, None])
    record: dict[str, Any] = {
        "size": list(observations.size),
        "peak": peak.tolist(),
        "heatmaps": _base64(codes.astype(np.uint8)),
    }
    if observations.crop is not None:
        crop = observations.crop[person]
        top, bottom, left, right = map(int, panels.content_box(crop))
        file = io.BytesIO()
        imsave(file, panels.faded(crop[top:bottom, left:right]), format="png")
        step = crop.shape[1] / observations.size[1], crop.shape[0] / observations.size[0]
        record["picture"] = {
            "png": base64.b64encode(file.getvalue()).decode(),
            "box": [left / step[0], top / step[1], right / step[0], bottom / step[1]],
        }
    return record


def _page(title: str, content: dict[str, Any]) -> str:
    folder = resources.files("fasthyp.viz")
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title),
        "palette": _palette(),
        "style": (folder / "viewer.css").read_text(encoding="utf-8"),
        # no text of the caller's can end the element that holds it
        "data": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        "script": (folder / "viewer.js").read_text(encoding="utf-8"),
    }
    template = (folder / "viewer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _palette() -> str:
    def variables(theme: str) -> str:
        colours = style.PALETTES[theme].items()
        return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours) + "}"

    return variables("light") + f"@media(prefers-color-scheme:dark){{{variables('dark')}}}"
