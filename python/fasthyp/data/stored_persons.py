"""Persons out of files, for training on them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from fasthyp.data.persons import PersonBatch


class StoredPersons:
    """Persons that are known, as a source for recipes.

    Training persons are drawn at random, the others taken evenly from the first to the last.

    Args:
        parts: by ``"train"``, ``"validation"``, ``"test"``.
    """

    def __init__(self, parts: dict[str, PersonBatch]) -> None:
        self.parts = parts

    def sample(self, number: int, seed: int, part: str = "train") -> PersonBatch:
        """Persons of a part, not more than there are but for training.

        Raises:
            ValueError: there is no such part, or no persons in it.
        """
        persons = self.parts.get(part, PersonBatch())
        if not len(persons):
            raise ValueError(f"part: expected one of {', '.join(self.parts)}, got {part!r}")
        if part == "train":
            generator = torch.Generator().manual_seed(seed % 2**63)
            return persons[torch.randint(len(persons), (number,), generator=generator)]
        chosen = torch.linspace(0, len(persons) - 1, min(number, len(persons)))
        return persons[chosen.round().long()]


def holds_poses(path: str | os.PathLike[str]) -> bool:
    """Whether a file has motion capture poses rather than persons.

    Raises:
        ValueError: it is no ``.npz`` file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return "poses_mm.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
