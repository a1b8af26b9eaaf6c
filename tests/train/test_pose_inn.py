"""Training of PoseINN: each loss term against its formula, and the recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.losses import PoseCritic, weighted_sum
from fasthyp.models import PoseINN
from fasthyp.train.pose_inn import (
    PoseINNBatch,
    PoseINNNoise,
    PoseINNObjective,
    PoseINNWeights,
)

HIPS = (0, 3)


def persons(number: int, seed: int = 0) -> PersonBatch:
    """Some joints certain, some not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(number, *shape, generator=generator, dtype=torch.float64)

    std = torch.where(normal(16, 1) > 0, 1.0, 4.0) * (0.2 * normal(16, 2)).exp()
    cos, sin = (angle := normal(16)).cos(), angle.sin()
    axes = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))
    joints = 0.3 * normal(17, 3)
    joints[:, 0] = (joints[:, 1] + joints[:, 4]) / 2
    return PersonBatch(
        joints_3d=joints - joints[:, :1],
        amplitude=normal(16).sigmoid(),
        mean=32 + 8 * normal(16, 2),
        covariance=axes @ torch.diag_embed(std**2) @ axes.mT,
    )


@pytest.fixture(name="case")
def _case() -> Any:
    torch.manual_seed(0)
    model, critic = PoseINN(hidden=8).double(), PoseCritic(hidden=8).double()
    for parameter in model.inn.parameters():
        parameter.data *= 4  # further from the identity
    batch = PoseINNBatch.of(model, persons(6))
    shapes = ((6, 16), (6, 16), (6, 9, 16))
    noise = PoseINNNoise(*(torch.randn(s, generator=_generator(1)).double() for s in shapes))
    return model, critic, batch, noise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rooted(pose: Tensor) -> Tensor:
    """(48,) -> (3, 17) relative to the middle of the hips, which comes first."""
    pose = pose.view(3, 16)
    root = (pose[:, HIPS[0]] + pose[:, HIPS[1]]) / 2
    return torch.cat([root[:, None], pose], 1) - root[:, None]


def reference_terms(case: Any, k: int, official: bool) -> dict[str, Tensor]:
    """Section 3 of the paper with one call of the network for every pose."""
    model, critic, (x, y, gauss), noise = case
    n, m = len(x), noise.hypotheses.shape[1]

    def back(z: Tensor, i: int) -> Tensor:
        latent: Tensor = torch.cat([z, y[i]])[None]
        return model.reverse(latent, gauss[i : i + 1])[0][0]

    forward = torch.cat([model(x[i : i + 1], gauss[i : i + 1])[0] for i in range(n)])
    z, y_hat = forward[:, :16], forward[:, 16:]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = (a - b).square().sum()
        return sum((s / (s + square) for s in (0.0025, 0.04, 0.81)), torch.zeros(()))

    v = torch.cat([noise.target, y], 1)
    w = torch.cat([z, y_hat.detach()], 1)
    same = [(i, j) for i in range(n) for j in range(n) if official or i != j]
    mmd = sum(kernel(v[i], v[j]) + kernel(w[i], w[j]) for i, j in same) / len(same)
    mmd = mmd - 2 * sum(kernel(v[i], w[j]) for i in range(n) for j in range(n)) / n**2

    det = torch.stack([(back(z[i].detach(), i) - x[i]).abs() for i in range(n)]).mean()
    fake = torch.stack([back(noise.generator[i], i) for i in range(n)])

    best, spread = [], []
    fitted = [0, 1, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # of MPII
    of_h36m = {0: 3, 1: 2, 4: 5, 5: 6, 7: 7, 8: 8, 9: 10, 10: 16, 11: 15, 12: 14}
    of_h36m |= {13: 11, 14: 12, 15: 13}
    for i in range(n):
        drawn = torch.stack([rooted(back(noise.hypotheses[i, j], i)) for j in range(m)])
        truth = rooted(x[i])
        order = (drawn - truth).norm(dim=1).mean(-1).argsort()[:k]
        difference = (drawn[order].mean(0) - truth).abs()
        best.append(difference.sum() / (3 * (17 if official else 16)))
        for place, joint in enumerate(fitted):
            a, b = drawn[:, 0, of_h36m[joint]], drawn[:, 1, of_h36m[joint]]
            found = torch.cov(torch.stack([a, b]))
            amplitude, _, _, *target = gauss[i].view(13, 6)[place]
            assert 0 <= amplitude <= 1.2
            xx, xy, yy = (t * 20**2 for t in target)  # doubled cells^2, 5 mm each
            if max(xx, yy) > 2.1**2:
                wanted = torch.stack([xx, yy, xy]) * 0.005**2
                gap = wanted - torch.stack([found[0, 0], found[1, 1], found[0, 1]])
                parts = [gap[0].clamp_min(0), gap[1].clamp_min(0), gap[2]]
                spread.append(torch.stack(parts).norm())
            else:
                spread.append(torch.zeros(()).double())
    assert any(float(s) > 0 for s in spread)
    assert any(float(s) == 0 for s in spread)
    return {
        "l2d": (y_hat - y).abs().mean(),
        "mmd": torch.as_tensor(mmd),
        "det": det,
        "generator": -critic(fake).mean(),
        "best_of_m": torch.stack(best).mean(),
        "covariance": torch.stack(spread).mean(),
    }


@pytest.mark.parametrize("official", [False, True])
def test_terms_and_their_gradients(case: Any, official: bool) -> None:
    model, critic, batch, noise = case
    objective = PoseINNObjective(top_k=3, official=official)
    found = objective.losses(model, critic, batch, noise)
    wanted = reference_terms(case, 3, official)
    assert found.keys() == wanted.keys()
    parameters = list(model.parameters())
    for name, term in found.items():
        torch.testing.assert_close(term, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
        ours = torch.autograd.grad(term, parameters, retain_graph=True)
        theirs = torch.autograd.grad(wanted[name], parameters, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("removed", ["l2d", "mmd", "det", "best_of_m", "covariance", "generator"])
def test_a_removed_term_leaves_the_others_as_they_were(case: Any, removed: str) -> None:
    model, critic, batch, noise = case
    full = PoseINNObjective().losses(model, critic, batch, noise)
    objective = PoseINNObjective(replace(PoseINNWeights(), **{removed: 0.0}))
    found = objective.losses(model, critic, batch, noise)
    assert found.keys() == full.keys() - {removed}
    for name, term in found.items():
        torch.testing.assert_close(term, full[name])


def test_a_term_alone(case: Any) -> None:
    none = PoseINNWeights(0, 0, 0, 0, 0, 0)
    for name in vars(none):
        objective = PoseINNObjective(replace(none, **{name: 1.0}))
        found = objective.losses(*case)
        torch.testing.assert_close(found, {name: PoseINNObjective().losses(*case)[name]})


def test_critic(case: Any) -> None:
    _, critic, batch, _ = case
    real, fake = batch.pose, batch.pose.roll(1, 0) + 0.2
    alpha = torch.rand(len(real), 1, generator=_generator(2)).double()
    terms = PoseINNObjective.critic_losses(critic, real, fake, alpha)
    torch.testing.assert_close(terms["critic"], critic(fake).mean() - critic(real).mean())
    slopes = []
    for i in range(len(real)):
        point = (alpha[i] * real[i] + (1 - alpha[i]) * fake[i]).requires_grad_()
        (slope,) = torch.autograd.grad(critic(point[None]).sum(), point)
        slopes.append((slope.norm() - 1) ** 2)
    torch.testing.assert_close(terms["gradient_penalty"], 10 * torch.stack(slopes).mean())
    weighted_sum(terms, {"critic": 1.0, "gradient_penalty": 1.0}).backward()
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"joints_3d": None}, "persons: expected joints_3d"),
        ({"joints_3d": torch.zeros(6, 16, 3)}, r"joints_3d \(B, 17, 3\)"),
        ({"joint_names": ("pelvis",) * 17}, "expected joints"),
        ({"amplitude": None}, "persons: expected amplitude"),
    ],
)
def test_persons_that_it_cannot_use(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PoseINNBatch.of(PoseINN(hidden=2), replace(persons(6), **change))
