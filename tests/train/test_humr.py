"""HUMR's recipe: terms against plain formulas, masks, samples, resuming."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyp.data.simulated_persons import render_gaussians
from fasthyp.losses import HUMR_WEIGHTS
from fasthyp.models import HUMR
from fasthyp.models.humr import HUMRConfig
from fasthyp.train import load_recipe
from fasthyp.train.humr import HUMRRecipe, HUMRRecipeConfig, detection_samples, person_masks
from fasthyp.train.recipe import run
from tests.models.random_persons import numbers
from tests.train.test_prohmr import TINY, assert_same, model_points, source, weights_of

ARTICULATED = (2, 3, 5, 6, 12, 13, 15, 16)  # knees, ankles, elbows, wrists of Human3.6M


def humr(**changes: Any) -> HUMRRecipe:
    model = HUMRConfig(
        image_features=10, betas=10, blocks=2, hidden=12, keypoint_hidden=9, keypoint_features=7,
        head_features=8, head_dropout=0.1, trunk_inputs=6 * 17, body="stick",
    )  # fmt: skip
    return HUMRRecipe(
        HUMRRecipeConfig(**{**TINY, "num_samples": 4, "model": model, **changes}), source()
    )


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """As the official code: the biased estimator, squared bandwidths."""
    total = torch.zeros(())
    for a in (0.05, 0.2, 0.9):
        for p, q, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
            square = (p[:, None] - q[None]).square().sum(-1)
            total = total + sign * (a**2 / (a**2 + square)).mean()
    return total


def test_terms_are_the_papers() -> None:
    recipe = humr()
    recipe.eval()
    model = recipe.model
    with torch.no_grad():
        model.head.init_cam.copy_(torch.tensor([[0.7, 0.02, 0.1]]))
    recipe._begin(7, slice(None))
    persons = recipe.persons()
    assert persons.visible is not None
    persons.amplitude[:, ::3] *= 0.4  # more that the detector does not see
    persons.covariance.mul_(9)  # samples beside the mask
    persons.joints_2d[:, 13, 0] = 70.0  # beyond the crop, though the detector is sure
    persons.amplitude[:, 13] = 0.9
    terms = recipe.losses(persons)
    assert terms.keys() == HUMR_WEIGHTS.keys() == recipe.weights.keys()

    recipe._begin(7, slice(None))
    z, noise = recipe.normal(4, 132), 0.005 * recipe.normal(132)
    z[:, 0] = 0
    factor = torch.linalg.cholesky(persons.covariance)
    eps = recipe.normal(3, 17, 2)
    samples = persons.mean[:, None] + torch.einsum("bkij,btkj->btki", factor, eps)

    cond = model.condition(persons)
    pose = torch.stack([model.flow(z[:, s], c=[cond], rev=True)[0] for s in range(4)], 1)
    first, second = pose.unflatten(-1, (22, 2, 3)).unbind(-2)
    x = torch.nn.functional.normalize(first, dim=-1)
    y = torch.nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    turns = torch.stack([x, y, torch.linalg.cross(x, y)], -2)
    hands = torch.eye(3).expand(8, 4, 2, 3, 3)
    betas, camera = model.head(cond)
    body = recipe.source.body
    turns = torch.cat([turns, hands], 2)
    joints = torch.stack(
        [body(betas, turns[:, s], pose2rot=False).vertices[:, model_points()] for s in range(4)], 1
    )
    points = model.project(joints, camera, persons)
    truth, samples = persons.joints_2d / 32 - 1, samples / 32 - 1
    gram = torch.stack([first, second], -2)
    gram = (gram @ gram.mT - torch.eye(2)).square().flatten(2).mean(-1)

    inside = (truth.abs() <= 1).all(-1)
    box = inside & (truth[..., 0].abs() <= 0.75)
    confidence = persons.amplitude.clamp(0, 1)
    moving = torch.zeros(17, dtype=torch.bool)
    moving[list(ARTICULATED)] = True
    discrepancy = torch.zeros(8, 17)
    for b in range(8):
        for k in range(17):
            c = float(confidence[b, k])
            if not inside[b, k] or (not moving[k] and c < 0.5):
                continue
            target = truth[b, k].repeat(3, 1)
            if 0.15 < c < 0.7 and moving[k] and box[b, k]:
                target[1:] = samples[b, 1:, k]
            discrepancy[b, k] = mmd(points[b, 1:, k], target)

    masks = recipe.masks(persons)
    assert masks is not None
    assert masks.shape == (8, 32, 32)
    off = torch.zeros(8, 3, 17)
    for b in range(8):
        pixels = masks[b].nonzero().flip(-1).float()

        def on(p: Tensor, pixels: Tensor = pixels) -> bool:
            return bool((pixels - p).norm(dim=-1).min() < 0.71)

        for k in range(17):
            if not (confidence[b, k] < 0.5 or not inside[b, k]):
                continue
            targets = [truth[b, k]]
            for t in range(3):
                place = (samples[b, t, k] + 1) * 16
                if (samples[b, t, k].abs() <= 1).all() and not (
                    (place <= 31).all() and not on(place)
                ):
                    targets.append(samples[b, t, k])
            for s in range(3):
                place = (points[b, 1 + s, k] + 1) * 16
                if (place >= 0).all() and (place <= 31).all() and not on(place):
                    off[b, s, k] = min((points[b, 1 + s, k] - t).abs().sum() for t in targets)
    true = torch.cat([persons.global_orient[:, None], persons.body_pose], 1)[:, :22]
    latent, log_det = model.flow(true[..., :2, :].flatten(1) + noise, c=[cond])
    expected = {
        "nll": ((0.5 * latent.square().sum(-1) - log_det) / 132).mean(),
        "keypoints_2d_mode": (points[:, 0] - truth).abs().sum() / 8,
        "heatmap_mmd": discrepancy.mean(),
        "betas_mode": (betas - persons.betas).square().sum() / 8,
        "orthonormality_mode": gram[:, 0].mean(),
        "orthonormality_exp": gram[:, 1:].mean(),
        "camera": (-10 * camera[:, 0]).exp().square().mean(),
        "mask": off.sum() / 24,
    }
    assert expected["mask"] > 0
    assert 0 < int((discrepancy == 0).sum()) < 8 * 17
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_masks_are_drawn_along_bones() -> None:
    points = 10 + 6 * numbers(3, 4, 2)
    bones = [(0, 1), (1, 2), (3, 3)]
    masks = person_masks(points, bones, 20, 2.0)
    for b in range(3):
        for row in range(20):
            for column in range(20):
                p = torch.tensor([column, row]).float()
                near = []
                for i, j in bones:
                    line = torch.linspace(0, 1, 2001)[:, None]
                    along = points[b, i] + line * (points[b, j] - points[b, i])
                    near.append((along - p).norm(dim=-1).min())
                if abs(min(near) - 2.0) > 1e-2:
                    assert bool(masks[b, row, column]) == (min(near) < 2.0)
    nowhere = torch.full((1, 1, 2), torch.inf)
    assert not person_masks(nowhere, [(0, 0)], 8, 2.0).any()


def test_masks_show_what_hides() -> None:
    recipe = humr()
    persons = source().sample(40, 0, "train")
    assert persons.visible is not None
    everything = replace(persons, visible=torch.ones_like(persons.visible))
    bare, whole = recipe.masks(everything), recipe.masks(persons)
    assert bare is not None
    assert whole is not None
    assert (whole | bare).equal(whole)
    inside = ((persons.joints_2d >= 1) & (persons.joints_2d <= 62)).all(-1)
    places = (persons.joints_2d / 2).long().clamp(0, 31)
    on = whole[torch.arange(40)[:, None], places[..., 1], places[..., 0]]
    assert on[inside].all()
    assert (whole.sum((1, 2)) > bare.sum((1, 2)))[(inside & ~persons.visible).any(1)].any()


def test_samples_are_of_the_detections() -> None:
    persons = source().sample(3, 0, "train")
    drawn = detection_samples(persons, numbers(3, 20_000, 17, 2))
    # whitened by the inverse of another root of the covariance than the code takes
    values, vectors = torch.linalg.eigh(persons.covariance)
    white = ((drawn - persons.mean[:, None])[..., None, :] @ vectors[:, None])[..., 0, :]
    white = white / values.sqrt()[:, None]
    torch.testing.assert_close(white.mean(1), torch.zeros(3, 17, 2), rtol=0, atol=0.04)
    spread = torch.einsum("btki,btkj->bkij", white, white) / 20_000
    torch.testing.assert_close(spread, torch.eye(2).expand(3, 17, 2, 2), rtol=0, atol=0.06)


def test_heatmaps_where_there_are_some() -> None:
    recipe = humr()
    recipe._begin(7, slice(None))
    persons = recipe.persons()
    maps = render_gaussians(persons.amplitude, persons.mean, persons.covariance)
    recipe._begin(7, slice(None))
    plain = recipe.losses(persons)
    values = []
    for _ in range(2):
        recipe._begin(7, slice(None))
        values.append(recipe.losses(replace(persons, heatmaps=maps)))
    assert values[0]["heatmap_mmd"] == values[1]["heatmap_mmd"] != plain["heatmap_mmd"]


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole = humr()
    start = weights_of(whole)
    run(whole, tmp_path / "whole", progress=False)
    run(humr(steps=1), tmp_path / "parts", progress=False)
    second = humr()
    run(second, tmp_path / "parts", resume=True, progress=False)
    assert_same(weights_of(whole), weights_of(second))
    learned = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert all(not torch.equal(start[name], whole.state_dict()[name]) for name in learned)
    saved = (tmp_path / "whole" / "metrics.csv").read_text()
    assert saved == (tmp_path / "parts" / "metrics.csv").read_text()
    loaded = HUMR.from_pretrained(tmp_path / "whole" / "model")
    persons = source().sample(2, 0, "test")
    assert loaded.hypotheses(persons, 3).joints_3d.shape == (2, 3, 17, 3)


def test_goes_to_other_processes() -> None:
    recipe = humr()
    assert load_recipe(recipe.name) is HUMRRecipe
    assert_same(weights_of(recipe), weights_of(pickle.loads(pickle.dumps(recipe))))


def test_default_is_the_papers_training() -> None:
    config = HUMRRecipeConfig()
    assert (config.steps, config.batch_size, config.learning_rate) == (400_000, 64, 1e-4)
    assert (config.weight_decay, config.num_samples) == (1e-4, 26)
    assert HUMRRecipeConfig.small(steps=9).steps == 9
