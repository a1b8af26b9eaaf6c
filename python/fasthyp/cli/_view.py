"""``fasthyp view``: read what ``fasthyp sample`` wrote, write the page, report."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fasthyp.data.readers._containers import NpzArrays
from fasthyp.observations import read_observations
from fasthyp.shards import Shards
from fasthyp.viz import write_viewer

_Read = Callable[[range], dict[str, Any]]  # persons -> arguments of write_viewer


def run(
    input: Path,
    out: Path | None,
    *,
    person: int | None,
    heatmaps: Path | None,
    max_persons: int,
    show: bool,
) -> None:
    """Write the page of one person, or of the first ``max_persons``.

    Raises:
        ValueError, OSError: in one line what is wrong; nothing is then written.
    """
    name = input.resolve().name
    out = input.parent / f"{name.removesuffix('.npz')}.html" if out is None else out
    if out.resolve() in [path.resolve() for path in (input, heatmaps) if path is not None]:
        raise ValueError(f"{out}: expected another file than those to read")
    if not input.exists():
        raise FileNotFoundError(f"{input}: no such file or folder")
    persons, read = _folder(input) if input.is_dir() else _file(input)
    if person is None:
        chosen = range(min(persons, max_persons))
    elif person < persons:
        chosen = range(person, person + 1)
    else:
        raise ValueError(f"--person: expected 0 to {persons - 1}, got {person}")
    arguments = read(chosen)
    if heatmaps is not None:
        observations = read_observations(heatmaps)
        if len(observations) != persons:
            raise ValueError(
                f"{heatmaps}: expected the {persons} persons of {input}, got {len(observations)}"
            )
        arguments["observations"] = observations.persons(chosen)
    try:
        write_viewer(out, **arguments, first=chosen.start, title=name)
    except ValueError as error:
        raise ValueError(f"{input}: {error}") from error

    said = f"person {chosen.start}" if len(chosen) == 1 else f"persons 0 to {chosen[-1]}"
    if len(chosen) < persons:
        said += f" of {persons}"
        if person is None:
            said += "; --max-persons takes more, --person another"
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB: {said}")
    if show:
        webbrowser.open(out.resolve().as_uri())


def _file(path: Path) -> tuple[int, _Read]:
    archive = NpzArrays(path)
    persons = archive.check("hypotheses", "M", "J", 3)
    optional = ("log_prob", "mode", "fit_mean", "fit_covariance")
    names = ["hypotheses", *(name for name in optional if name in archive.names)]
    for name in names:
        if archive.shape(name)[:1] != (persons,):
            raise ValueError(
                f"{path}: {name}: expected {persons} persons, got shape {archive.shape(name)}"
            )

    def read(chosen: range) -> dict[str, Any]:
        arrays: dict[str, Any] = {name: archive.rows(name, np.array(chosen)) for name in names}
        return {**arrays, "joint_names": archive.texts("joint_names")}

    return persons, read


def _folder(path: Path) -> tuple[int, _Read]:
    """Shards hold the mode as the first of the hypotheses."""
    shards = Shards(path)
    if shards.manifest["num_samples"] < 2:
        raise ValueError(f"{path}: expected two hypotheses of a person or more, got the mode alone")

    def read(chosen: range) -> dict[str, Any]:
        poses = np.stack([shards[person] for person in chosen])
        arguments = {"hypotheses": poses[:, 1:], "mode": poses[:, 0]}
        if shards.has_log_prob:
            arguments["log_prob"] = np.stack([shards.log_prob(person) for person in chosen])[:, 1:]
        return {**arguments, "joint_names": shards.joint_names}

    return len(shards), read
