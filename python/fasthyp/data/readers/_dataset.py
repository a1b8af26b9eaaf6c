"""Persons of files, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fasthyp.data.persons import PersonBatch

Fields = dict[str, Any]
"""Arrays and tensors by the names of :class:`PersonBatch`'s fields; None: not known."""

GRID = 64
"""Side in cells of the square about a person to which points in pixels are scaled."""


@dataclass(frozen=True)
class Clip:
    """A stretch of persons that is read as one: a sequence, or a whole file.

    Attributes:
        name: of the sequence.
        length: number of persons.
        read: the fields of :class:`PersonBatch` of some of them, by their numbers (R,).
        group: the row of the table in which they are counted, such as the action; one name, or one
            for each person; empty for none.
    """

    name: str
    length: int
    read: Callable[[np.ndarray], Fields]
    group: str | Sequence[str] = ""


class PersonDataset(Dataset[PersonBatch]):
    """Persons of clips, read on demand; safe in the worker processes of a ``DataLoader``:

        DataLoader(dataset, batch_size=64, num_workers=2, collate_fn=PersonBatch.cat)

    Args:
        clips: in order.
        joint_names, detector_names: of all persons.
        every: take every n-th person of each clip only.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        joint_names: Sequence[str] = (),
        detector_names: Sequence[str] = (),
        every: int = 1,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.clips = [clip for clip in clips if clip.length]
        self.joint_names, self.detector_names = tuple(joint_names), tuple(detector_names)
        self.every = every
        lengths = [-(-clip.length // every) for clip in self.clips]
        self.ends = np.cumsum(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> PersonBatch:
        """One person (a batch of one) or several.

        Raises:
            IndexError: there is no such person.
            ValueError: the file is damaged, or an array has the wrong shape; names it.
        """
        numbers = self._numbers(rows)
        parts = []
        clip, inside = self._places(numbers)
        starts = np.flatnonzero(np.diff(clip, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(clip)], strict=True):
            fields = self.clips[clip[start]].read(inside[start:stop])
            known = {name: _tensor(value) for name, value in fields.items() if value is not None}
            parts.append(
                PersonBatch(
                    joint_names=self.joint_names if "joints_3d" in known else (),
                    detector_names=self.detector_names,
                    **known,
                )
            )
        return parts[0] if len(parts) == 1 else PersonBatch.cat(parts)

    def __getitems__(self, rows: list[int]) -> list[PersonBatch]:
        """How a ``DataLoader`` asks for a batch."""
        return [self[rows]]

    def groups(self, rows: int | slice | Sequence[int] | Tensor) -> list[str] | None:
        """The names of the groups of these persons, None where the clips have none."""
        if not any(len(clip.group) for clip in self.clips):
            return None
        names = []
        for clip, row in zip(*self._places(self._numbers(rows)), strict=True):
            group = self.clips[clip].group
            names.append(group if isinstance(group, str) else group[row])
        return names

    def name(self, row: int) -> str:
        """The clip and the number in it of a person."""
        clip, inside = self._places(self._numbers(row))
        return f"{self.clips[clip[0]].name}/{inside[0]}"

    def _numbers(self, rows: Any) -> np.ndarray:
        total = len(self)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(total))
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        numbers = np.atleast_1d(np.asarray(rows))
        bad = (numbers < -total) | (numbers >= total)
        if bad.any():
            raise IndexError(f"person {numbers[bad][0]}: there are {total}")
        return np.where(numbers < 0, numbers + total, numbers)

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        clip = np.searchsorted(self.ends, numbers, side="right")
        starts = np.concatenate([[0], self.ends[:-1]]) if len(self.ends) else self.ends
        return clip, (numbers - starts[clip]) * self.every


def _tensor(value: np.ndarray | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    value = np.ascontiguousarray(value)
    value = value if value.flags.writeable else value.copy()
    return torch.from_numpy(value if value.dtype == bool else value.astype(np.float32, copy=False))


def into_cells(
    fields: Fields, origin: np.ndarray, side: np.ndarray, sigma: float | None = None
) -> Fields:
    """Fields in pixels as fields in cells of a 64 x 64 map over each person's square.

    Args:
        fields: ``joints_2d``, ``mean``, ``centre`` and ``focal_length`` are scaled; where ``mean``
            is known, ``sigma`` makes the detected points Gaussians.
        origin: (R, 2) upper left corner of the squares; ``side`` (R,) theirs; pixels.
        sigma: cells, the standard deviation of each point, where the file has no heatmaps.
    """
    unit = GRID / side
    fields = dict(fields)
    for name in ("joints_2d", "mean"):
        points = fields.get(name)
        if points is not None:
            fields[name] = (points - origin[:, None]) * unit[:, None, None]
    if fields.get("centre") is not None:
        fields["centre"] = (fields["centre"] - origin) * unit[:, None]
    if fields.get("focal_length") is not None:
        fields["focal_length"] = fields["focal_length"] * unit
    mean = fields.get("mean")
    if sigma is not None and mean is not None:
        if not sigma > 0:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        fields["covariance"] = np.broadcast_to(sigma**2 * np.eye(2), (*mean.shape, 2))
    return fields


def square_about(points: np.ndarray, margin: float = 1.25) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners (R, 2) and sides (R,) of squares about the known of points (R, K, 2),
    wider than their box by ``margin``; points that are NaN are left out."""
    known = np.isfinite(points).all(-1, keepdims=True)
    low = np.where(known, points, np.inf).min(1)
    high = np.where(known, points, -np.inf).max(1)
    some = known.any((1, 2))[:, None]
    low, high = np.where(some, low, 0.0), np.where(some, high, 1.0)
    side = np.maximum(margin * (high - low).max(1), 1e-6)
    return (low + high) / 2 - side[:, None] / 2, side


def root_at_origin(joints: np.ndarray, root: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Joints (R, J, 3) about the mean of the root joints, and that root (R, 3)."""
    middle = joints[:, np.atleast_1d(root)].mean(1)
    return joints - middle[:, None], middle


def projected(points: np.ndarray, focal: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Points (R, J, 3) in camera axes on the picture (R, J, 2); ``focal`` (R,), ``centre`` (R, 2)
    in pixels."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return focal[:, None, None] * points[..., :2] / points[..., 2:] + centre[:, None]
