"""Persons out of files, for training on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fasthyp.data.gaussian_features import standard_features
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import PersonDataset


class StoredPersons:
    """Known persons as a source for recipes.

    Training persons are drawn at random, the others taken evenly from the first to the last.
    Persons with Gaussians and without ``features`` get :func:`standard_features`.

    Args:
        parts: by ``"train"``, ``"validation"``, ``"test"``: a batch, or a data set of
            :func:`fasthyp.data.readers.open_persons`.
    """

    def __init__(self, parts: Mapping[str, PersonBatch | PersonDataset]) -> None:
        self.parts = parts

    def sample(self, number: int, seed: int, part: str = "train") -> PersonBatch:
        """Persons of a part, not more than there are but for training.

        Raises:
            ValueError: there is no such part, or no persons in it.
        """
        known = self.parts.get(part, PersonBatch())
        if not len(known):
            raise ValueError(f"part: expected one of {', '.join(self.parts)}, got {part!r}")
        if part == "train":
            generator = torch.Generator().manual_seed(seed % 2**63)
            rows = torch.randint(len(known), (number,), generator=generator)
        else:
            rows = torch.linspace(0, len(known) - 1, min(number, len(known))).round().long()
        persons = known[rows]
        gaussians = (persons.amplitude, persons.mean, persons.covariance)
        if persons.features is None and all(value is not None for value in gaussians):
            persons = replace(persons, features=standard_features(*gaussians))  # type: ignore[arg-type]
        return persons
