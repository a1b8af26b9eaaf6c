"""Hypotheses of millions of persons, in files of so many each.

A run is a folder: ``manifest.json`` says what is sampled, ``shard-000000.npz`` and so on hold it.
Shards do not depend on each other or on who makes them, so any number of processes and machines
that see the folder can share the work, and a run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fasthyp import __version__
from fasthyp._files import replacing
from fasthyp._seed import check_int
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers._containers import NpzArrays
from fasthyp.evaluation import Persons
from fasthyp.models.hypotheses import Hypothesiser, draw
from fasthyp.pipeline import check_memory

MANIFEST = "manifest.json"
_MILLIMETRES = 1000.0


@dataclass(frozen=True)
class Done:
    """What :func:`sample_shards` did.

    Attributes:
        made: shards that were sampled; ``kept``: those that were complete already.
        shards: of the whole run, by all processes.
    """

    made: list[int]
    kept: list[int]
    shards: int


def sample_shards(
    model: Hypothesiser,
    data: Persons,
    folder: str | os.PathLike[str],
    num_samples: int = 1000,
    *,
    seed: int = 0,
    shard_size: int = 1000,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    precision: str = "high",
    rank: int = 0,
    world: int = 1,
    about: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda persons: None,
) -> Done:
    """Sample the shards ``rank``, ``rank + world``, ... of a run; those that are complete are
    verified and kept.

    Persons are read when their batch is sampled, and one shard is in memory at a time.

    Args:
        model: in eval mode, on ``device``.
        data: the persons, with what the model sees.
        folder: of the run; made where missing.
        num_samples: M, hypotheses per person; the first is the mode.
        seed: hypothesis m of person p depends on the seed, p and m alone.
        shard_size: persons per file.
        batch_size: persons at a time; changes no hypothesis (on a GPU: but for rounding).
        device: where to compute.
        precision: ``"highest"``, ``"high"`` or ``"medium"``, where the model has the choice.
        rank, world: which of how many processes this is.
        about: names to be kept in the manifest, such as those of the model and the data.
        progress: called with the number of persons done since the last call.

    Returns:
        What was done. Each shard holds ``hypotheses`` (n, M, J, 3) mm in camera axes, ``log_prob``
        (n, M) nats where the model has a density, ``joint_names``, ``first`` (the number of its
        first person) and ``run``.

    Raises:
        ValueError: the folder holds another run (names the setting that differs), a shard does not
            fit into memory, or the model or the data does not do.
        OSError: a file cannot be written.
    """
    for name, value in (
        ("num_samples", num_samples),
        ("shard_size", shard_size),
        ("batch_size", batch_size),
        ("world", world),
    ):
        check_int(name, value, 1, 2**32)
    check_int("seed", seed, 0, 2**64)
    check_int("rank", rank, 0, world)
    if not len(data):
        raise ValueError("data: expected at least one person")
    check_memory(min(shard_size, len(data)), num_samples)
    manifest: dict[str, Any] = {
        "version": __version__,
        "persons": len(data),
        "shard_size": shard_size,
        "num_samples": num_samples,
        "seed": seed,
        "precision": precision,
        "weights": _weights(model),
        "first_and_last": _digest_of(PersonBatch.cat([data[:1], data[len(data) - 1 : len(data)]])),
    }
    run = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _agree(target / MANIFEST, {**manifest, "run": run}, about or {})
    count = -(-len(data) // shard_size)
    done = Done([], [], count)
    for number in range(rank, count, world):
        first, stop = number * shard_size, min((number + 1) * shard_size, len(data))
        path = shard_path(target, number)
        for stale in target.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)  # of a process that was killed
        if _is_complete(path, run, first, stop - first, num_samples):
            done.kept.append(number)
            progress(stop - first)
            continue
        arrays: dict[str, np.ndarray] = {}
        for start in range(first, stop, batch_size):
            end = min(start + batch_size, stop)
            persons = data[start:end].to(device)
            answer = draw(
                model, persons, num_samples, seed, image_offset=start, precision=precision
            )
            found = {"hypotheses": answer.joints_3d * _MILLIMETRES}
            if answer.log_prob is not None:
                found["log_prob"] = answer.log_prob
            for name, values in found.items():
                part = values.float().cpu().numpy()
                if name not in arrays:
                    arrays[name] = np.empty((stop - first, *part.shape[1:]), np.float32)
                arrays[name][start - first : end - first] = part
            progress(end - start)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                **arrays,  # type: ignore[arg-type]
                joint_names=np.array(answer.joint_names),
                first=np.int64(first),
                run=np.array(run),
            )
        done.made.append(number)
    return done


def shard_path(folder: str | os.PathLike[str], number: int) -> Path:
    return Path(folder) / f"shard-{number:06d}.npz"


def _weights(model: Hypothesiser) -> str:
    """Digest of the class and the state of a model."""
    digest = hashlib.sha256(type(model).__name__.encode())
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of(persons: PersonBatch) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(persons.tensors().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _agree(path: Path, manifest: dict[str, Any], about: dict[str, str]) -> None:
    """Write the manifest, or compare with the one that is there: of several processes one writes
    it, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**manifest, **about}, indent=2) + "\n")
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(temporary, path)
            return
    finally:
        temporary.unlink(missing_ok=True)
    there = read_manifest(path.parent)
    for name, value in manifest.items():
        if there.get(name) != value:
            raise ValueError(
                f"{path.parent}: holds another run: {name} is {there.get(name)!r} there, "
                f"{value!r} now"
            )


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        ValueError: the folder has none, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable manifest: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a readable manifest: got {type(value).__name__}")
    return value


def _is_complete(path: Path, run: str, first: int, count: int, num_samples: int) -> bool:
    """Whether a shard is there, is of this run, and its bytes are those that were written."""
    if not path.is_file():
        return False
    try:
        arrays = NpzArrays(path)
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        return (
            whole
            and arrays.texts("run") == [run]
            and arrays.all("first").tolist() == first
            and arrays.shape("hypotheses")[:2] == (count, num_samples)
        )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        return False


class Shards:
    """The hypotheses of a complete run, mapped into memory.

    Args:
        folder: of the run.

    Attributes:
        manifest: of the run.
        joint_names: the J joints.

    Raises:
        ValueError: the manifest or a shard is missing or damaged; names it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.manifest = read_manifest(folder)
        size, persons = self.manifest["shard_size"], self.manifest["persons"]
        self._files = []
        for number in range(-(-persons // size)):
            path = shard_path(folder, number)
            if not path.is_file():
                raise ValueError(f"{path}: the run is not complete: this shard is missing")
            self._files.append(NpzArrays(path))
        self.joint_names = tuple(self._files[0].texts("joint_names"))

    def __len__(self) -> int:
        return int(self.manifest["persons"])

    def __getitem__(self, person: int) -> np.ndarray:
        """(M, J, 3) mm of one person."""
        return self._of(person, "hypotheses")

    @property
    def has_log_prob(self) -> bool:
        """Whether the model of the run has a density."""
        return "log_prob" in self._files[0].names

    def log_prob(self, person: int) -> np.ndarray:
        """(M,) nats of one person's hypotheses."""
        return self._of(person, "log_prob")

    def _of(self, person: int, name: str) -> np.ndarray:
        if not 0 <= person < len(self):
            raise IndexError(f"person {person}: there are {len(self)}")
        number, row = divmod(person, self.manifest["shard_size"])
        return self._files[number].rows(name, np.array([row]))[0]
