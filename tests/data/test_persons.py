"""Batches of persons: rows, fields, and their joining; hypotheses beside them."""

from __future__ import annotations

import pytest
import torch

from fasthyp.data import PersonBatch
from fasthyp.models import Hypotheses


def batch(number: int = 4) -> PersonBatch:
    return PersonBatch(
        joints_3d=torch.arange(6.0 * number).view(number, 2, 3),
        visible=torch.arange(3 * number).view(number, 3) % 2 == 0,
        joint_names=("a", "b"),
        detector_names=("c", "d", "e"),
    )


def test_rows() -> None:
    persons = batch()
    assert len(persons) == 4
    assert len(PersonBatch()) == 0
    assert list(persons.tensors()) == ["joints_3d", "visible"]
    for rows in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        some = persons[rows]
        assert len(some) == 2
        assert torch.equal(some.need("joints_3d")[0], persons.need("joints_3d")[0][1:3])
        assert torch.equal(some.need("visible")[0], persons.need("visible")[0][1:3])
        assert some.joint_names == ("a", "b")
        assert some.detector_names == ("c", "d", "e")


def test_devices() -> None:
    moved = batch().to("meta")
    assert all(value.device.type == "meta" for value in moved.tensors().values())


def test_needs() -> None:
    joints, visible = batch().need("joints_3d", "visible")
    assert joints.shape == (4, 2, 3)
    assert visible.dtype == torch.bool
    with pytest.raises(ValueError, match=r"expected heatmaps, got only \['joints_3d', 'visible'\]"):
        batch().need("joints_3d", "heatmaps")


def test_joins() -> None:
    persons = batch()
    joined = PersonBatch.cat([persons[:1], persons[1:]])
    assert torch.equal(joined.need("joints_3d")[0], persons.need("joints_3d")[0])
    assert joined.detector_names == persons.detector_names
    poorer = PersonBatch(joints_3d=torch.zeros(2, 2, 3), joint_names=("a", "b"))
    assert list(PersonBatch.cat([persons, poorer]).tensors()) == ["joints_3d"]
    assert len(PersonBatch.cat([])) == 0


def test_refuses_different_rows() -> None:
    with pytest.raises(ValueError, match=r"expected as many rows.*'mean': 3"):
        PersonBatch(mean=torch.zeros(3, 1, 2), amplitude=torch.zeros(2, 1))


def test_is_immutable() -> None:
    with pytest.raises(AttributeError):
        batch().mean = torch.zeros(4, 1, 2)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Hypotheses(torch.zeros(1, 1, 1, 3), ("a",)).log_prob = None  # type: ignore[misc]
