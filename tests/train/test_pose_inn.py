"""Training of PoseINN: each loss term against its formula, and the recipe."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.losses import PoseCritic, weighted_sum
from fasthyp.models import PoseINN
from fasthyp.models.pose_inn import PoseINNConfig
from fasthyp.skeleton import H36M17_JOINTS
from fasthyp.train.pose_inn import (
    PoseINNBatch,
    PoseINNNoise,
    PoseINNObjective,
    PoseINNRecipe,
    PoseINNRecipeConfig,
    PoseINNWeights,
)
from fasthyp.train.recipe import run

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
    assert any(float(s.detach()) > 0 for s in spread)
    assert any(float(s.detach()) == 0 for s in spread)
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


class Source:
    """Random persons; train, validation and test differ."""

    def sample(self, number: int, seed: int, part: str) -> PersonBatch:
        found = persons(number, seed + 1000 * len(part))
        single = {name: value.float() for name, value in found.tensors().items()}
        return replace(found, **single, joint_names=H36M17_JOINTS)


TINY = PoseINNRecipeConfig(
    steps=3,
    batch_size=6,
    learning_rate=1e-3,
    schedule="constant",
    validate_every=2,
    validation_size=5,
    validation_samples=4,
    log_every=1,
    hypotheses=7,
    critic_steps=2,
    critic_hidden=8,
    clip_value=0.05,
    model=PoseINNConfig(hidden=8),
)


def test_the_defaults_are_those_of_the_paper() -> None:
    config = PoseINNRecipeConfig()
    assert (config.batch_size, config.learning_rate, config.weight_decay) == (64, 1e-4, 0)
    assert (config.hypotheses, config.top_k, config.critic_steps) == (200, 5, 5)
    assert (config.steps, config.milestones, config.decay) == (74_710, (72_300,), 0.5)
    assert config.clip_value == 15
    assert config.model.hidden == 1024
    assert config.weights == PoseINNWeights(1, 10, 4, 4, 750, 1)
    code = PoseINNRecipeConfig.official()
    assert code == replace(config, official_code=True, model=PoseINNConfig(hidden=1028))
    recipe = PoseINNRecipe(replace(TINY, critic_hidden=4), Source())
    for optimizer in recipe.configure_optimizers():
        assert all(group["betas"] == (0.5, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize("official", [False, True])
def test_a_step_is_that_of_the_paper(official: bool, tmp_path: Path) -> None:
    """Two critic steps with Adam, then one of the network with clipped gradients."""
    config = replace(TINY, steps=1, official_code=official)
    trained = PoseINNRecipe(config, Source())
    largest = {}

    def look(_optimizer: Any) -> None:
        for name, part in (("inn", trained.model.inn), ("cond_net", trained.model.cond_net)):
            given = [p.grad for p in part.parameters() if p.grad is not None]
            largest[name] = max((float(g.abs().max()) for g in given), default=0.0)

    trained.on_before_optimizer_step = look  # type: ignore[method-assign]
    run(trained, tmp_path, progress=False)

    recipe = PoseINNRecipe(config, Source())
    seed = 1_000_003  # of step 0
    recipe._begin(seed, slice(None))
    model, critic = recipe.model, recipe.critic
    adam = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.9)) for m in (model, critic)]
    whole = PoseINNBatch.of(model, Source().sample(5 * 6, seed, "train"))
    batches = [PoseINNBatch(*(t[6 * k : 6 * k + 6] for t in whole)) for k in range(5)]
    latents = [recipe.normal(16), recipe.normal(16)]
    for k in (0, 1):
        real, other = batches[1 + 2 * k], batches[2 + 2 * k]
        with torch.no_grad():
            fake = model.reverse(torch.cat([latents[k], other.pose_2d], 1), other.gauss)[0]
        alpha = torch.special.ndtr(recipe.normal(1))
        points = (alpha * real.pose + (1 - alpha) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        loss = critic(fake).mean() - critic(real.pose).mean()
        adam[1].zero_grad()
        (loss + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
        adam[1].step()
    noise = PoseINNNoise(recipe.normal(16), recipe.normal(16), recipe.normal(7, 16))
    terms = PoseINNObjective(official=official).losses(model, critic, batches[0], noise)
    weights = {"l2d": 1, "generator": 1, "mmd": 10, "det": 4, "best_of_m": 4, "covariance": 750}
    adam[0].zero_grad()
    sum(weights[name] * term for name, term in terms.items()).backward()  # type: ignore[union-attr]
    gradients = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    assert max(gradients) > config.clip_value
    parts = [model.inn] if official else [model.inn, model.cond_net]
    for parameter in (p for part in parts for p in part.parameters()):
        if parameter.grad is not None:
            parameter.grad.clamp_(-config.clip_value, config.clip_value)
    adam[0].step()
    for (name, a), b in zip(trained.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)
    assert largest["inn"] == pytest.approx(config.clip_value)
    assert (largest["cond_net"] > 1.01 * config.clip_value) == official
    # Adam makes steps of rounding noise where real and fake cancel, as in the last bias; what the
    # critic thinks of poses is not touched by it.
    start = PoseINNRecipe(config, Source()).critic
    moved = []
    with torch.no_grad():
        for end in (trained.critic, critic):
            change = (end(whole.pose) - start(whole.pose))[:, 0]
            moved.append(change - change.mean())
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[1].norm()


def test_resumed_runs_are_the_same(tmp_path: Path) -> None:
    whole = run(PoseINNRecipe(TINY, Source()), tmp_path / "whole", progress=False)
    run(PoseINNRecipe(replace(TINY, steps=2), Source()), tmp_path / "part", progress=False)
    resumed = PoseINNRecipe(TINY, Source())
    run(resumed, tmp_path / "part", resume=True, progress=False)
    curves = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "part")]
    assert curves[0].splitlines()[-1] == curves[1].splitlines()[-1]
    assert "train_gradient_penalty" in curves[0]
    loaded = PoseINN.from_pretrained(tmp_path / "whole" / "model")
    for a, b in zip(whole.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """The MMD too, which is no mean over persons."""
    config = replace(TINY, steps=2)
    run(PoseINNRecipe(config, Source()), tmp_path / "one", progress=False)
    run(PoseINNRecipe(config, Source()), tmp_path / "two", progress=False, devices=2)
    one, two = (
        [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())
        ]
        for name in ("one", "two")
    )
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        # the gradient of the critic's last bias is rounding noise, of which Adam makes whole steps
        assert a.pop("train_generator") == pytest.approx(b.pop("train_generator"), abs=0.02)
        assert a.pop("train_loss") == pytest.approx(b.pop("train_loss"), abs=0.02)
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


def test_without_the_generator_there_is_no_critic_to_train(tmp_path: Path) -> None:
    config = replace(TINY, steps=1, weights=PoseINNWeights(generator=0.0))
    recipe = PoseINNRecipe(config, Source())
    before = [p.detach().clone() for p in recipe.critic.parameters()]
    run(recipe, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, recipe.critic.parameters(), strict=True))
    assert "critic" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"critic_steps": -1}, "critic_steps"),
        ({"top_k": 8}, "top_k: expected 1 to 7"),
        ({"hypotheses": 1, "top_k": 1}, "hypotheses"),
        ({"clip_value": 0.0}, "clip_value"),
        ({"clip_norm": 1.0}, "clip_norm: expected None"),
    ],
)
def test_settings_that_make_no_sense(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)
