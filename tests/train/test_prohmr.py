"""ProHMR's recipes: terms against plain formulas, the alternation, resuming."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data.simulated_persons import SimulatedPersons, StickPoses
from fasthyp.losses import PROHMR_LIFTING_WEIGHTS, PROHMR_WEIGHTS, discriminator_loss
from fasthyp.models import ProHMR, ProHMRLifting, load
from fasthyp.models.flow_model import stick_joints
from fasthyp.models.prohmr import ProHMRConfig, ProHMRLiftingConfig
from fasthyp.train import load_recipe
from fasthyp.train.prohmr import (
    ProHMRLiftingRecipe,
    ProHMRLiftingRecipeConfig,
    ProHMRRecipe,
    ProHMRRecipeConfig,
    common_joints,
)
from fasthyp.train.recipe import run
from tests.models.random_persons import numbers, rotations

TINY: dict[str, Any] = {
    **{"steps": 2, "batch_size": 8, "validate_every": 1, "validation_size": 6},
    **{"validation_samples": 3, "log_every": 1, "seed": 3},
}


def source() -> SimulatedPersons:
    """Stick persons in random poses."""
    poses = StickPoses(
        rotations=rotations(12, 24, scale=0.3),
        betas=0.5 * numbers(12, 10),
        subject=torch.arange(12) % 3,
        error=torch.zeros(12, 17),
    )
    return SimulatedPersons(dict.fromkeys(("train", "validation", "test"), poses))


def prohmr(**changes: Any) -> ProHMRRecipe:
    model = ProHMRConfig(16, 12, 2, 1, 0.1, 10, trunk_inputs=6 * 17, body="stick")
    config = ProHMRRecipeConfig(
        **{**TINY, "num_samples": 3, "discriminator_features": 8, "model": model, **changes}
    )
    return ProHMRRecipe(config, source())


def lifting(**changes: Any) -> ProHMRLiftingRecipe:
    model = ProHMRLiftingConfig(H36M17_JOINTS, H36M17_JOINTS[1:], 16, 12, 2, 1, 0.1, 14, 1)
    config = ProHMRLiftingRecipeConfig(**{**TINY, "model": model, **changes})
    return ProHMRLiftingRecipe(config, source())


def weights_of(recipe: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in recipe.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **close: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], **(close or {"rtol": 0, "atol": 0}), msg=name)


def test_terms_are_the_papers() -> None:
    recipe = prohmr()
    recipe.eval()  # no dropout: what is below has none
    model = recipe.model
    recipe._begin(7, slice(None))
    persons = recipe.persons()
    terms = recipe.losses(persons)
    assert terms.keys() == PROHMR_WEIGHTS.keys() == recipe.weights.keys()

    recipe._begin(7, slice(None))
    z, noise = recipe.normal(2, 144), 0.005 * recipe.normal(144)
    cond = model.trunk(persons.features)
    latents = torch.cat([torch.zeros(8, 1, 144), z], 1)
    pose = torch.stack([model.flow._transform.inverse(latents[:, s], cond)[0] for s in range(3)], 1)
    first, second = pose.unflatten(-1, (24, 2, 3)).unbind(-2)
    x = torch.nn.functional.normalize(first, dim=-1)
    y = second - (x * second).sum(-1, keepdim=True) * x
    y = torch.nn.functional.normalize(y, dim=-1)
    turns = torch.stack([x, y, torch.linalg.cross(x, y)], -1)
    true = torch.cat([persons.global_orient[:, None], persons.body_pose], 1)
    offset = model.fc_head.layers(cond)
    betas, camera = offset[:, :10], offset[:, 10:] + torch.tensor([0.9, 0, 0])
    joints = torch.stack(
        [
            recipe.source.body(betas, turns[:, s], pose2rot=False).vertices[:, model_points()]
            for s in range(3)
        ],
        1,
    )
    depth = 2 * 5000 / (224 * camera[:, 0] + 1e-9)
    moved = joints + torch.stack([camera[:, 1], camera[:, 2], depth], -1)[:, None, None]
    seen = 5000 / 224 * moved[..., :2] / moved[..., 2:]
    pelvis = joints - joints[:, :, :1], persons.joints_3d - persons.joints_3d[:, :1]
    gram = torch.stack([first, second], -2)
    gram = (gram @ gram.mT - torch.eye(2)).square().flatten(2).mean(-1)
    errors = {
        "keypoints_2d": (seen - (persons.joints_2d / 64 - 0.5)[:, None]).abs().sum((-2, -1)),
        "keypoints_3d": (pelvis[0] - pelvis[1][:, None]).abs().sum((-2, -1)),
        "global_orient": (turns[:, :, 0] - true[:, None, 0]).square().sum((-2, -1)),
        "body_pose": (turns[:, :, 1:] - true[:, None, 1:]).square().sum((-3, -2, -1)),
        "betas": (betas - persons.betas).square().sum(-1)[:, None].expand(-1, 3),
        "orthonormality": gram,
    }
    expected = {"nll": -model.flow.log_prob(true[..., :2].mT.flatten(1) + noise, cond)[0].mean()}
    for name, error in errors.items():
        expected[f"{name}_mode"] = error[:, 0].sum() / 8
        expected[f"{name}_exp"] = error[:, 1:].sum() / 16
    scores = recipe.discriminator(turns[:, :, 1:].flatten(0, 1), betas.repeat_interleave(3, 0))
    expected["adversarial"] = (scores - 1).square().sum() / 8
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=2e-4, atol=1e-4, msg=name)


def model_points() -> list[int]:
    regressor = stick_joints().regressor
    assert regressor is not None
    return regressor.argmax(1).tolist()


def test_lifting_terms_are_the_papers() -> None:
    recipe = lifting()
    recipe.eval()
    model = recipe.model
    recipe._begin(7, slice(None))
    persons = recipe.persons()
    terms = recipe.losses(persons)
    assert terms.keys() == PROHMR_LIFTING_WEIGHTS.keys()
    recipe._begin(7, slice(None))
    noise = 0.005 * recipe.normal(16, 3)
    cond = model.trunk(((persons.mean - model.keypoint_mean) / model.keypoint_std).flatten(1))
    truth = persons.joints_3d[:, 1:]
    mode = model.flow._transform.inverse(torch.zeros(8, 48), cond)[0].unflatten(1, (16, 3))
    torch.testing.assert_close(
        terms["keypoints_3d_mode"], (mode - truth).abs().sum() / 8, rtol=1e-4, atol=1e-5
    )
    log_prob = model.flow.log_prob((truth + noise).flatten(1), cond)[0]
    torch.testing.assert_close(terms["nll"], -log_prob.mean(), rtol=1e-4, atol=1e-3)
    many = recipe.source.sample(4096, 3, "train").mean
    torch.testing.assert_close(model.keypoint_mean, many.mean(0))
    torch.testing.assert_close(model.keypoint_std, many.std(0))


def test_regressor_and_critic_step_in_turn(tmp_path: Path) -> None:
    """One step of the runner, written out."""
    ran, ours = prohmr(steps=1), prohmr(steps=1)
    start = weights_of(ours)
    assert_same(start, weights_of(ran))

    ours.train()
    ours._begin((3 + 1) * 1_000_003, slice(None))
    persons = ours.persons()
    settings = {"lr": ours.config.learning_rate, "weight_decay": 1e-4}
    model, critic = list(ours.model.parameters()), list(ours.discriminator.parameters())
    first, second = torch.optim.AdamW(model, **settings), torch.optim.AdamW(critic, **settings)
    terms, prediction = ours._predict(persons)
    loss = sum(PROHMR_WEIGHTS[name] * term for name, term in terms.items())
    first.zero_grad()
    loss.backward()
    first.step()
    second.zero_grad()  # of what the regressor's loss left there
    fakes = prediction.rotations[:, :, 1:].flatten(0, 1).detach()
    shapes = prediction.betas.repeat_interleave(3, 0).detach()
    value = discriminator_loss(
        ours.discriminator(persons.body_pose, persons.betas), ours.discriminator(fakes, shapes)
    )
    (PROHMR_WEIGHTS["adversarial"] * value).backward()
    second.step()

    run(ran, tmp_path, progress=False)
    after = weights_of(ran)
    expected = weights_of(ours)
    for part in ("model.", "discriminator."):
        moved = [
            name for name in start if name.startswith(part) and start[name].is_floating_point()
        ]
        assert any(not torch.equal(start[name], after[name]) for name in moved)
    # A gradient of nothing but rounding (a bias before a batch norm) is made a step by Adam.
    skipped = ("fc_block.0.bias", "fc_block.4.bias", "linear_layers.0.bias", "num_batches_tracked")
    for name, value in expected.items():
        if not name.endswith(skipped):
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=3e-5, msg=name)


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_resumes_where_it_stopped(make: Any, tmp_path: Path) -> None:
    whole, first = make(), make(steps=1)
    run(whole, tmp_path / "whole", progress=False)
    run(first, tmp_path / "parts", progress=False)
    second = make()
    run(second, tmp_path / "parts", resume=True, progress=False)
    assert second.step == 2
    assert_same(weights_of(whole), weights_of(second))
    saved = (tmp_path / "whole" / "metrics.csv").read_text()
    assert saved == (tmp_path / "parts" / "metrics.csv").read_text()
    kind = ProHMR if make is prohmr else ProHMRLifting
    loaded = load(tmp_path / "whole" / "model")
    assert isinstance(loaded, kind)
    persons = source().sample(2, 0, "test")
    assert loaded.hypotheses(persons, 3).joints_3d.shape == (2, 3, 17, 3)


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_the_flow_is_initialised_by_the_first_batch(make: Any) -> None:
    recipe = make()
    norms = [m for name, m in recipe.model.flow.named_modules() if hasattr(m, "log_scale")]
    assert all(bool(norm.initialized) for norm in norms)
    persons = recipe.source.sample(512, 11, "train")
    recipe.model.eval()
    cond = recipe.model.condition(persons)
    x = recipe.model.target(persons)
    x = recipe.model.to_6d(x) if make is prohmr else x.flatten(1)
    x = x + 0.005 * numbers(*x.shape)
    _, z = recipe.model.log_prob(x[:, None], cond)
    assert z.abs().mean() < 5  # joints that never turn among them
    assert_same(weights_of(recipe), weights_of(make()))


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_goes_to_other_processes(make: Any) -> None:
    recipe = make()
    assert load_recipe(recipe.name) is type(recipe)
    assert_same(weights_of(recipe), weights_of(pickle.loads(pickle.dumps(recipe))))


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_default_is_the_papers_training(make: Any) -> None:
    config = type(make()).Config()
    assert (config.batch_size, config.learning_rate, config.schedule) == (64, 1e-4, "constant")
    assert config.steps == (500_000 if make is prohmr else 300_000)
    assert type(config).small(steps=9).steps == 9


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="body: expected 'stick' or nothing, got 'wood'"):
        ProHMR(
            body=None,
            **{"context_features": 4, "hidden_features": 4},
            config=ProHMRConfig(body="wood"),
        )
    with pytest.raises(ValueError, match="joints: expected some of"):
        common_joints(("a",), ("b",))
    assert common_joints(("a", "b", "c"), ("c", "a")) == (("a", "c"), [0, 2], [1, 0])
