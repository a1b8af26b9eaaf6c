"""The tables of the papers, of any model that answers with hypotheses.

``evaluate(model, data)`` streams over persons and hypotheses in constant memory. Under
``torch.distributed`` each process takes its share of the persons and all return the same result,
which depends neither on their number nor on the batch size (but for the rounding of sums).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fasthyp._seed import check_int
from fasthyp.data.persons import PersonBatch
from fasthyp.metrics.hypotheses import diversity, sharpness
from fasthyp.metrics.modular import Calibration, Metric, Pearson
from fasthyp.metrics.pose import auc, cps_of_worst, mpjpe, pck, pve, root_centred, worst_of
from fasthyp.metrics.procrustes import aligned_distances
from fasthyp.metrics.uncertainty import confidence_rank, count_inside
from fasthyp.models.hypotheses import Hypotheses, Hypothesiser, derive_seed, draw

CHUNK = 1000
"""Hypotheses at a time. Spread and calibration are of the first so many."""

HARD_SIGMA = 5.0
"""Cells: 2.5 times the standard deviation of the training heatmaps of Wehrbein et al., ICCV 2021,
whose highly ambiguous persons have a joint with a wider fit (``data_h36m.py`` of their code)."""

PCK_LEFT_OUT = ("pelvis", "spine", "jaw")
"""Of a Human3.6M pose these do not count for PCK: :data:`fasthyp.metrics.PCK_JOINTS` by name. Of
one with a ``head_top`` (MPI-INF-3DHP) it is the ``head`` instead of the jaw."""

CPS_LEFT_OUT = ("spine",)
"""The same for the Correct Poses Score: :data:`fasthyp.metrics.CPS_JOINTS`."""

_ROWS, _MESHES = 32_768, 1_000  # hypotheses of all persons of a batch; with vertices
_SCORES = ("pck150", "auc", "cps_mm")  # the best is the greatest


class Persons(Protocol):
    """What is evaluated on: a :class:`PersonBatch`, or a dataset that reads them on demand. One
    whose ``groups(rows)`` names each person's action or sequence gets a row per name."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> PersonBatch: ...


def evaluate(
    model: Hypothesiser,
    data: Persons,
    num_samples: Sequence[int] = (1, 10, 200, 1000),
    *,
    seed: int = 0,
    joints: Sequence[str] | None = None,
    hard_sigma: float = HARD_SIGMA,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda persons: None,
) -> dict[str, Any]:
    """Errors, scores, spread and calibration of a model's hypotheses.

    Poses are compared relative to the pelvis, or to the mean of both hips where one of the two has
    no pelvis. Joints whose truth is NaN do not count.

    Args:
        model: any model of :mod:`fasthyp.models`, in eval mode and on ``device``.
        data: with ``joints_3d`` and what the model sees.
        num_samples: for each M the best of the first M hypotheses, the mode among them.
        seed: of the hypotheses.
        joints: names of the joints to compare; all that data and model share unless told.
        hard_sigma: cells; a person of whose fitted Gaussians one has a standard deviation beyond
            it is of the hard subset, which gets a row where ``covariance`` is known.
        batch_size: most persons at a time.
        device: where to compute.
        progress: called with the number of persons done since the last call.

    Returns:
        Plain numbers, None where there are none: ``all``, ``hard``, ``groups`` (by name) and
        ``mean_over_groups`` are rows of

        - ``persons``: how many;
        - ``mode``, ``mean_hypothesis`` (of their mean), ``average`` (the mean of the errors of
          the random hypotheses), ``best_of`` (by M): ``mpjpe_mm`` (protocol 1), ``pa_mpjpe_mm``
          (protocol 2, aligned by a similarity), ``pck150`` and ``auc`` (3DPCK, without
          :data:`PCK_LEFT_OUT`), ``cps_mm`` (aligned, without :data:`CPS_LEFT_OUT`) and, where
          data and model have vertices, ``pve_mm``;
        - of the random hypotheses ``sharpness_mm``, ``diversity_mm`` (x, y, z),
          ``calibration_error`` and ``coverage`` (by level: the share of true joints in the region
          that holds this share of the hypotheses);
        - ``pcc``: correlation of each joint's uncertainty (the model's own, or the sharpness)
          with the mode's error.

    Raises:
        TypeError, ValueError: an argument is out of range, or data and model share no joints or
            no root.
    """
    wanted = sorted(set(num_samples))
    if not len(data):
        raise ValueError("data: expected at least one person")
    if not wanted:
        raise ValueError("num_samples: expected at least one number")
    for number in wanted:
        check_int("num_samples", number, 1, 2**32)
    check_int("batch_size", batch_size, 1, 2**31)
    most = wanted[-1]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = data[:1]
    batch_size = _persons_at_a_time(batch_size, min(most, CHUNK), first.vertices is not None)
    rows: dict[str, _Row] = {}
    joined: _Joints | None = None
    names: tuple[str, ...] = ()
    for start in range(rank * batch_size, len(data), world * batch_size):
        part = slice(start, min(start + batch_size, len(data)))
        persons = data[part].to(device)
        numbers, joined = _numbers(model, persons, wanted, seed, start, joints, joined)
        names = names or tuple(name for name in numbers if not name.startswith("_"))
        labels = data.groups(part) if hasattr(data, "groups") else None
        for name, chosen in _rows_of(persons, labels, hard_sigma):
            if name not in rows:
                rows[name] = _Row(names, device)
            rows[name].update(numbers, chosen)
        progress(part.stop - part.start)
    shared = (joined.names, joined.root_names) if joined else ((), ())
    if world > 1:  # all processes must add up the same rows
        found: list[Any] = [None] * world
        dist.all_gather_object(found, (sorted(rows), names, shared))
        names, shared = next(theirs[1:] for theirs in found if theirs[1])
        for name in {name for theirs in found for name in theirs[0]}:
            if name not in rows:
                rows[name] = _Row(names, device)
    results = {name: rows[name].result() for name in sorted(rows)}
    groups = {name[6:]: row for name, row in results.items() if name.startswith("group ")}
    return {
        "persons": len(data),
        "num_samples": wanted,
        "seed": seed,
        "joints": list(shared[0]),
        "root": list(shared[1]),
        **{name: results[name] for name in ("all", "hard") if name in results},
        **(
            {"groups": groups, "mean_over_groups": _mean_of(list(groups.values()))}
            if groups
            else {}
        ),
    }


def _persons_at_a_time(batch_size: int, hypotheses: int, vertices: bool) -> int:
    return max(1, min(batch_size, (_MESHES if vertices else _ROWS) // hypotheses))


def _rows_of(
    persons: PersonBatch, labels: Sequence[str] | None, hard_sigma: float
) -> Iterable[tuple[str, Tensor]]:
    """Names of rows, and which of these persons they are about (B,)."""
    everyone = torch.ones(len(persons), dtype=torch.bool)
    yield "all", everyone
    if persons.covariance is not None:
        a, d = persons.covariance[..., 0, 0], persons.covariance[..., 1, 1]
        b = persons.covariance[..., 0, 1]
        variance = (a + d) / 2 + torch.hypot((a - d) / 2, b)
        yield "hard", (variance > hard_sigma**2).any(1).cpu()
    if labels is not None:
        for label in sorted(set(labels)):
            yield f"group {label}", torch.tensor([other == label for other in labels])


class _Joints:
    """The joints that data and model share, in the order of the data, and the root."""

    def __init__(
        self, persons: PersonBatch, answer: Hypotheses, wanted: Sequence[str] | None
    ) -> None:
        both = [name for name in persons.joint_names if name in answer.joint_names]
        if wanted is not None:
            for name in wanted:
                if name not in both:
                    raise ValueError(f"joints: data and model do not share {name!r}, but {both}")
            both = list(wanted)
        known = set(persons.joint_names) & set(answer.joint_names)
        roots = (("pelvis",), ("left_hip", "right_hip"))
        root = next((names for names in roots if known.issuperset(names)), None)
        if not both or root is None:
            raise ValueError(
                "persons: expected joints that the model has, a pelvis or both hips among them, "
                f"got {persons.joint_names}; the model has {answer.joint_names}"
            )
        self.names, self.root_names = tuple(both), root
        self.of_data = [persons.joint_names.index(name) for name in (*both, *root)]
        self.of_model = [answer.joint_names.index(name) for name in (*both, *root)]

    def centred(self, poses: Tensor, index: list[int]) -> Tensor:
        """Millimetres, relative to the root."""
        count = len(self.names)
        chosen = 1000 * poses[..., index, :].float()
        return root_centred(chosen, tuple(range(count, len(index))))[..., :count, :]

    def but(self, left_out: Sequence[str]) -> list[int]:
        kept = [j for j, name in enumerate(self.names) if name not in left_out]
        return kept or list(range(len(self.names)))


@torch.no_grad()
def _numbers(
    model: Hypothesiser,
    persons: PersonBatch,
    wanted: list[int],
    seed: int,
    first: int,
    joints: Sequence[str] | None,
    known_names: _Joints | None,
) -> tuple[dict[str, Tensor], _Joints]:
    """What counts of each of B persons, by name; hypotheses a chunk at a time."""
    (true_joints,) = persons.need("joints_3d")
    most = wanted[-1]
    numbers: dict[str, Tensor] = {}
    best: dict[str, Tensor] = {}
    sums: dict[str, Any] = {}
    mean: Any = 0
    for chunk, start in enumerate(range(0, most, CHUNK)):
        count = min(CHUNK, most - start)
        answer = draw(
            *(model, persons, count, derive_seed(seed, chunk) if chunk else seed),
            include_mode=chunk == 0,
            vertices=persons.vertices is not None,
            image_offset=first,
        )
        names = known_names = known_names or _Joints(persons, answer, joints)
        truth = names.centred(true_joints, names.of_data)
        known = truth.isfinite().all(-1)
        poses = names.centred(answer.joints_3d, names.of_model)
        errors = _errors(poses, truth, known, names) | _mesh_errors(persons, answer, names)
        drawn = poses[:, 1:] if chunk == 0 else poses
        for name, values in errors.items():
            for number in wanted:
                if number <= start:
                    continue
                key = f"best_of.{number}.{name}"
                part = values[:, : number - start]
                greatest = name in _SCORES
                new = part.amax(1) if greatest else part.amin(1)
                before = best.get(key, new)
                best[key] = torch.maximum(before, new) if greatest else torch.minimum(before, new)
            sums[name] = sums.get(name, 0) + values[:, values.shape[1] - drawn.shape[1] :].sum(
                1, dtype=torch.float64
            )
        mean = mean + drawn.sum(1, dtype=torch.float64)
        if chunk == 0:
            numbers |= {f"mode.{name}": values[:, 0] for name, values in errors.items()}
            numbers |= _spread(drawn, poses[:, 0], truth, known, answer, names)
    numbers |= best
    numbers["persons"] = torch.ones(len(persons), device=true_joints.device)
    if most > 1:
        numbers |= {f"average.{name}": total / (most - 1) for name, total in sums.items()}
        average = (mean / (most - 1)).float()[:, None]
        errors = _errors(average, truth, known, names)
        numbers |= {f"mean_hypothesis.{name}": values[:, 0] for name, values in errors.items()}
    return numbers, names


def _errors(poses: Tensor, truth: Tensor, known: Tensor, names: _Joints) -> dict[str, Tensor]:
    """(B, M) of hypotheses (B, M, J, 3); NaN where no joint of the person is known."""
    truth = torch.where(known[..., None], truth, 0.0)[:, None]
    mask = known[:, None]
    aligned = aligned_distances(poses, truth, mask)
    left_out = ("pelvis", "spine", "head") if "head_top" in names.names else PCK_LEFT_OUT
    counted = names.but(left_out)
    some = (poses[..., counted, :], truth[..., counted, :])
    some_mask = mask[..., counted]
    correct = names.but(CPS_LEFT_OUT)
    worst = worst_of(aligned[..., correct], mask[..., correct])
    errors = {
        "mpjpe_mm": mpjpe(poses, truth, mask),
        "pa_mpjpe_mm": aligned.sum(-1) / mask.sum(-1),
        "pck150": pck(*some, mask=some_mask),
        "auc": auc(*some, mask=some_mask),
        "cps_mm": cps_of_worst(worst, tuple(range(1, 301))),
    }
    nobody = ~known.any(-1)[:, None]
    return {name: values.masked_fill(nobody, torch.nan) for name, values in errors.items()}


def _mesh_errors(persons: PersonBatch, answer: Hypotheses, names: _Joints) -> dict[str, Tensor]:
    if persons.vertices is None or answer.vertices is None:
        return {}
    assert persons.joints_3d is not None
    roots = len(names.names)
    true_root = persons.joints_3d[:, names.of_data[roots:]].mean(1, keepdim=True)
    root = answer.joints_3d[:, :, names.of_model[roots:]].mean(2, keepdim=True)
    truth = (persons.vertices - true_root)[:, None]
    return {"pve_mm": 1000 * pve(answer.vertices - root, truth.to(answer.vertices))}


def _spread(
    drawn: Tensor, mode: Tensor, truth: Tensor, known: Tensor, answer: Hypotheses, names: _Joints
) -> dict[str, Tensor]:
    """Of the random hypotheses (B, M, J, 3): spread, and what calibration and correlation need."""
    # a root that is one joint is at the origin in all hypotheses: nothing is uncertain about it
    free = names.but(names.root_names if len(names.root_names) == 1 else ())
    error = (mode - truth).norm(dim=-1)[:, free]
    numbers = {"_error": error}
    if answer.uncertainty is not None:
        of_model = [names.of_model[j] for j in free]
        numbers["_uncertainty"] = answer.uncertainty[:, of_model].to(error)
    if drawn.shape[1] >= 2:
        drawn, truth = drawn[:, :, free], truth[:, free]
        spread = sharpness(drawn)
        numbers["sharpness_mm"] = spread.mean(-1)
        for axis, values in zip("xyz", diversity(drawn).mean(1).unbind(-1), strict=True):
            numbers[f"diversity_mm.{axis}"] = values
        truth = truth.masked_fill(~known[:, free, None], torch.nan)
        numbers["_rank"] = confidence_rank(drawn, truth)
        numbers.setdefault("_uncertainty", spread)
    return numbers


class _Means(Metric):
    """Means of named numbers per person, NaN left out."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, number: int) -> None:
        super().__init__()
        zero = torch.zeros(number, dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """(B, names)."""
        known = ~values.isnan()
        self.total += torch.where(known, values, 0.0).sum(0, dtype=torch.float64)
        self.count += known.sum(0)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Means and counts (names,)."""
        return self.total / self.count, self.count


class _Ranks(Calibration):
    """Calibration of ranks that are known already."""

    def update(self, ranks: Tensor) -> None:  # type: ignore[override]
        inside, count = count_inside(ranks, self.levels)
        self.inside += inside
        self.count += count


class _Row:
    """One row of the table, added up over persons and processes."""

    def __init__(self, names: tuple[str, ...], device: torch.device | str) -> None:
        self.names = names
        self.means = _Means(len(names)).to(device)
        self.ranks = _Ranks().to(device)
        self.pcc = Pearson().to(device)

    def update(self, numbers: dict[str, Tensor], chosen: Tensor) -> None:
        if not chosen.any():
            return
        chosen = chosen.to(self.means.device)
        part = {name: values[chosen] for name, values in numbers.items()}
        self.means.update(torch.stack([part[name].double() for name in self.names], -1))
        if "_rank" in part:
            self.ranks.update(part["_rank"])
        if "_uncertainty" in part:
            uncertainty, error = part["_uncertainty"], part["_error"]
            both = uncertainty.isfinite() & error.isfinite()
            self.pcc.update(uncertainty[both], error[both])

    def result(self) -> dict[str, Any]:
        with warnings.catch_warnings():  # of a process that saw no person of this row
            warnings.filterwarnings("ignore", message=".*compute.*before.*update")
            means, counts = self.means.compute()
            coverage, calibration = self.ranks.compute()
            pcc = self.pcc.compute()
        row: dict[str, Any] = {"persons": int(counts[self.names.index("persons")])}
        for name, value in zip(self.names, means.tolist(), strict=True):
            *path, last = name.split(".")
            place = row
            for step in path:
                place = place.setdefault(step, {})
            if name != "persons":
                place[last] = _plain(value)
        if not coverage.isnan().any():
            levels = [f"{level:g}" for level in self.ranks.levels.tolist()]
            row["calibration_error"] = float(calibration)
            row["coverage"] = dict(zip(levels, coverage.tolist(), strict=True))
        row["pcc"] = _plain(float(pcc))
        return row


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over rows, as the papers have it over actions."""
    mean: dict[str, Any] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if isinstance(values[0], dict):
            mean[name] = _mean_of([value for value in values if isinstance(value, dict)])
        elif name == "persons":
            mean[name] = sum(values)
        else:
            known = [value for value in values if value is not None]
            mean[name] = sum(known) / len(known) if known else None
    return mean
