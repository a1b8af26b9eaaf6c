"""The recipe of POCO: its terms, its three stages, resumption, self-improvement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from fasthyp.data import PersonBatch
from fasthyp.losses import POCO_CLIFF_WEIGHTS, normalised_residual
from fasthyp.models import POCO, POCOConfig
from fasthyp.models.poco import rotations
from fasthyp.train.poco import POCORecipe, POCORecipeConfig, WithPseudoTruth, self_improve
from fasthyp.train.recipe import run
from tests.simulated import source, stick

MODEL = POCOConfig(
    **{"features": 16, "hidden": 16, "dropout": 0.0, "scale_hidden": 12, "condition": 8},  # type: ignore[arg-type]
    flow_hidden=10,
)


def config(**changes: Any) -> POCORecipeConfig:
    settings: dict[str, Any] = {
        **{"steps": 6, "pretrain_steps": 2, "joint_steps": 2, "batch_size": 8},
        **{"learning_rate": 1e-2, "validate_every": 3, "validation_size": 6, "log_every": 1},
        **{"objective": "code", "conditioned": 0.25, "model": MODEL},
    }
    return POCORecipeConfig(**{**settings, **changes})


def recipe(step: int = 0, **changes: Any) -> POCORecipe:
    made = POCORecipe(config(**changes), source())
    made.step = step
    return made


def batch() -> PersonBatch:
    return source().sample(8, 3, "train")


def test_the_regression_starts_at_the_mean_body() -> None:
    net = recipe().model
    persons = source().sample(5000, 2, "train")
    assert persons.betas is not None
    torch.testing.assert_close(net.head.init_shape[0], persons.betas.mean(0))
    mean = rotations(persons).mean(0)
    torch.testing.assert_close(net.head.init_pose.view(24, 3, 2), mean[..., :2])


def test_terms_of_the_released_objective() -> None:
    made, persons = recipe(step=2), batch()
    made.model.eval()  # batch norm as it is
    terms = made.losses(persons)
    shown = torch.arange(8) < 2
    predicted = made.model.predict(persons, shown)
    truth = rotations(persons)
    square = (predicted.pose - truth).square()
    expected = square[~shown].mean() + square[shown].mean() + predicted.sigma[shown].mean()
    torch.testing.assert_close(terms["pose"], expected)
    log_prob = made.model.log_prob(predicted, truth)
    torch.testing.assert_close(terms["flow"], predicted.sigma.log().mean() - log_prob.mean())
    joints = made.model.joints(predicted.pose, predicted.betas)
    assert persons.joints_3d is not None
    assert persons.joints_2d is not None
    torch.testing.assert_close(terms["keypoints_3d"], (joints - persons.joints_3d).square().mean())
    _, mesh = stick()(predicted.betas, predicted.pose, vertices=True)
    assert mesh is not None
    assert persons.vertices is not None
    pelvis = stick()(predicted.betas, predicted.pose)[0][:, :1]
    torch.testing.assert_close(terms["vertices"], (mesh - pelvis - persons.vertices).abs().mean())
    seen = made.model.joints_2d(predicted, joints, persons)
    assert persons.focal_length is not None
    assert persons.betas is not None
    image = persons.focal_length / 2**0.5
    error = (seen - persons.joints_2d).square() * (4 / (64 * image))[:, None, None]
    torch.testing.assert_close(terms["keypoints_2d"], error.mean())
    torch.testing.assert_close(terms["betas"], (predicted.betas - persons.betas).square().mean())
    assert {*terms} == {*POCO_CLIFF_WEIGHTS}


def test_terms_of_equation_6() -> None:
    changes = {"objective": "paper", "flow_weight": 0.3, "base_weight": 0.5, "sigma_weight": 0.7}
    made, persons = recipe(step=2, conditioned=0.0, **changes), batch()
    made.model.eval()
    predicted, truth = made.model.predict(persons), rotations(persons)
    residual = normalised_residual(predicted.pose, truth, predicted.sigma)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(residual).mean()
    log_prob = made.model.log_prob(predicted, truth).mean()
    expected = -0.3 * log_prob - 0.5 * normal + 0.7 * predicted.sigma.log().mean()
    terms = made.losses(persons)
    torch.testing.assert_close(terms["residual"], expected)
    assert "pose" not in terms
    assert made.weights["residual"] == 60


@pytest.mark.parametrize("sigma_dim", [1, 9])
def test_the_likelihood_is_that_of_the_residual(sigma_dim: int) -> None:
    """Of a change of variables with the scale: nine log sigma for a part of one sigma."""
    model = replace(MODEL, sigma_dim=sigma_dim)
    made, persons = recipe(step=2, objective="likelihood", conditioned=0.0, model=model), batch()
    made.model.eval()
    predicted, truth = made.model.predict(persons), rotations(persons)
    sigma = predicted.sigma.reshape(8, 24, sigma_dim).expand(-1, -1, 9)
    density = made.model.log_prob(predicted, truth) - sigma.log().sum(-1)
    terms = made.losses(persons)
    torch.testing.assert_close(terms["flow"], -density.mean() / 9)
    torch.testing.assert_close(terms["pose"], (predicted.pose - truth).square().mean())
    found = made.validate(persons)
    torch.testing.assert_close(found["nll"], -density.mean(1) / 9)
    assert {*found} == {"mode_mm", "best_mm", "mean_mm", "uncertainty", "nll"}


def test_the_stages_train_what_they_should() -> None:
    made, persons = recipe(), batch()
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    for step, stage, learns in (
        (0, "pretrain", {"head", "trunk"}),
        (2, "joint", {"head", "trunk", "scale", "density"}),
        (4, "frozen", {"scale", "density"}),
    ):
        made.step = step
        assert made.stage == stage
        made.model.train()
        made.model.zero_grad()
        statistics = {k: v.clone() for k, v in made.model.trunk.state_dict().items()}  # type: ignore[union-attr]
        sum(made.losses(persons).values()).backward()  # type: ignore[union-attr]
        learnt = {
            name.split(".")[0]
            for name, value in made.model.named_parameters()
            if value.grad is not None
        }
        assert learnt == learns
        still = all(
            torch.equal(v, statistics[k])
            for k, v in made.model.trunk.state_dict().items()  # type: ignore[union-attr]
        )
        assert still == (stage == "frozen")
        assert made.model.training
        assert made.model.trunk.training
    assert all(torch.equal(value, before[name]) for name, value in made.model.named_parameters())


def test_hmr_is_trained_in_the_crop() -> None:
    made = recipe(step=2, model=replace(MODEL, head="hmr"))
    made.model.eval()
    persons = batch()
    predicted = made.model.predict(persons)
    seen = made.model.joints_2d(
        predicted, made.model.joints(predicted.pose, predicted.betas), persons
    )
    assert persons.joints_2d is not None
    error = ((seen - persons.joints_2d) / 32).square().mean()
    terms = made.body_losses(predicted, persons)
    torch.testing.assert_close(terms["keypoints_2d"], error)


def test_training_and_resuming(tmp_path: Path) -> None:
    whole = run(recipe(), tmp_path / "whole", progress=False)
    assert isinstance(whole, POCO)
    run(recipe(steps=3), tmp_path / "part", progress=False)
    again = run(recipe(), tmp_path / "part", resume=True, progress=False)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = POCO.from_pretrained(tmp_path / "whole" / "model", body=stick())
    persons = source().sample(3, 0, "test")
    expected = whole.hypotheses(persons, 4).joints_3d
    assert torch.equal(loaded.hypotheses(persons, 4).joints_3d, expected)


def test_self_improvement(tmp_path: Path) -> None:
    made = recipe(steps=2, pretrain_steps=0)
    run(made, tmp_path / "first", progress=False)
    unlabelled = source().sample(20, 9, "test")
    sure = made.model.whole_body_uncertainty(made.model.predict(unlabelled)).detach()
    limit = float(sure.median())
    second = replace(made.config, pretrain_steps=0, learning_rate=1e-9)
    model, kept = self_improve(
        made, unlabelled, tmp_path / "second", second, limit, share=0.5, progress=False
    )
    assert torch.equal(kept, sure < limit)
    # From where it was: with hardly a learning rate it stays there.
    start = dict(made.model.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, start[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="keep_below: expected a threshold"):
        self_improve(made, unlabelled, tmp_path / "third", second, 0.0)
    other = replace(second, model=replace(MODEL, hidden=17))
    with pytest.raises(ValueError, match="config: expected the model of the recipe"):
        self_improve(made, unlabelled, tmp_path / "third", other)


def test_a_share_of_a_batch_has_pseudo_truth() -> None:
    def features(persons: PersonBatch) -> Tensor:
        return persons.need("features")[0]

    pseudo = source().sample(5, 9, "test")
    mixed = WithPseudoTruth(source(), pseudo, 0.25)
    found = features(mixed.sample(8, 3, "train"))
    assert torch.equal(found[:6], features(source().sample(6, 3, "train")))
    assert all((row == features(pseudo)).all(1).any() for row in found[6:])
    assert torch.equal(features(mixed.sample(8, 3, "train")), found)
    others = [features(mixed.sample(8, seed, "train"))[6:] for seed in range(4, 9)]
    assert not all(torch.equal(rows, found[6:]) for rows in others)
    held_out = features(mixed.sample(8, 3, "validation"))
    assert torch.equal(held_out, features(source().sample(8, 3, "validation")))
    with pytest.raises(ValueError, match="share, pseudo"):
        WithPseudoTruth(source(), pseudo, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "nll"}, "objective: expected"),
        ({"conditioned": 2.0}, "conditioned: expected"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_features_of_another_width_pass_through_a_trunk() -> None:
    made = POCORecipe(POCORecipeConfig.small(steps=7), source())
    assert made.config.steps == 7
    assert made.model.config.trunk_inputs == 102
    with_own = POCORecipe(config(), source(), backbone=torch.nn.Linear(102, 16))
    assert with_own.model.trunk is None
