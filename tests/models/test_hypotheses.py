"""Hypotheses of any model: of a person alone, whatever the split into batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fasthyp.data import PersonBatch
from fasthyp.models import Hypotheses
from fasthyp.models.hypotheses import derive_seed, draw


def persons(number: int) -> PersonBatch:
    return PersonBatch(features=torch.arange(float(number))[:, None])


@dataclass
class Whole:
    """A model without ``image_offset``: its noise depends on the batch."""

    lost: int | None = None

    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
    ) -> Hypotheses:
        (features,) = persons.need("features")
        generator = torch.Generator().manual_seed(seed % 2**63)
        noise = torch.randn(num_samples, len(persons), 2, 3, generator=generator).transpose(0, 1)
        if include_mode:
            noise[:, 0] = 0
        joints = features[:, None, None] + noise
        joints[(features[:, 0] == self.lost)] = torch.nan
        mesh = joints.repeat(1, 1, 2, 1) if vertices else None
        return Hypotheses(joints, ("a", "b"), log_prob=noise.sum((2, 3)), vertices=mesh)


class Counted(Whole):
    """A model that is told the number of the first person."""

    def hypotheses(  # type: ignore[override]
        self, *arguments: int, image_offset: int = 0, **options: bool
    ) -> Hypotheses:
        answer = super().hypotheses(*arguments, **options)  # type: ignore[arg-type]
        return Hypotheses(answer.joints_3d + image_offset, answer.joint_names)


def test_of_a_person_alone() -> None:
    everyone = draw(Whole(), persons(5), 4, seed=3, vertices=True)
    assert everyone.joints_3d.shape == (5, 4, 2, 3)
    assert everyone.joint_names == ("a", "b")
    assert everyone.uncertainty is None
    parts = [
        draw(Whole(), persons(5)[rows], 4, 3, vertices=True, image_offset=rows.start)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    for name in ("joints_3d", "log_prob", "vertices"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(everyone, name))
    noise = everyone.joints_3d[:, 1:] - everyone.joints_3d[:, :1]
    assert len(noise.flatten(1).unique(dim=0)) == 5
    assert torch.equal(everyone.joints_3d[:, 0, 0, 0], torch.arange(5.0))
    other = draw(Whole(), persons(5), 4, seed=4)
    assert not torch.equal(other.joints_3d, everyone.joints_3d)


def test_a_model_that_counts_is_asked_once() -> None:
    answer = draw(Counted(), persons(3), 2, image_offset=100)
    assert torch.equal(answer.joints_3d[:, 0, 0, 0], torch.arange(3.0) + 100)
    assert answer.log_prob is None


@pytest.mark.parametrize("model", [Whole(lost=2), Counted(lost=2)])
def test_lost_hypotheses_are_named(model: Whole) -> None:
    with pytest.raises(ValueError, match="person 9 are not finite"):
        draw(model, persons(4), 2, image_offset=7)


def test_seeds_of_numbers_are_all_different() -> None:
    # The first outputs of SplitMix64 of the seed 0.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [derive_seed(0, k) for k in range(3)] == first
    seeds = {derive_seed(seed, number) for seed in range(30) for number in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**64 for seed in seeds)
