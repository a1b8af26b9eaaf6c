"""The recipe of ProPose: its terms, its two phases, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from fasthyp.data import PersonBatch
from fasthyp.models import ProPose, ProPoseConfig
from fasthyp.train.propose import ProPoseRecipe, ProPoseRecipeConfig
from fasthyp.train.recipe import run
from tests.simulated import source

MODEL = ProPoseConfig(
    latent=6, hidden=16, code=8, discriminator_latent=4, flow_blocks=2, flow_hidden=10
)


def config(**changes: Any) -> ProPoseRecipeConfig:
    settings: dict[str, Any] = {
        **{"steps": 8, "phase_1_steps": 2, "phase_2_steps": 1, "batch_size": 8},
        **{"validate_every": 4, "validation_size": 6, "validation_samples": 3, "log_every": 1},
        **{"hypotheses": 4, "best": 2, "model": MODEL},
    }
    return ProPoseRecipeConfig(**{**settings, **changes})


def recipe(**changes: Any) -> ProPoseRecipe:
    made = ProPoseRecipe(config(**changes), source())
    made._begin(5, slice(None))
    return made


def batch() -> PersonBatch:
    return source().sample(8, 3, "train")


def test_phases_take_turns() -> None:
    made = recipe()
    phases = []
    for made.step in range(7):
        phases.append(made.phase)
    assert phases == [1, 1, 2, 1, 1, 2, 1]


def test_terms_of_the_first_phase() -> None:
    made, persons = recipe(skip=0.0), batch()
    net, pose = made.model, persons.joints_3d
    assert pose is not None
    pose_2d = net.pose_2d(persons)
    terms, discriminated = made.phase_1(persons)
    made._begin(5, slice(None))
    noise = made.normal(6)
    mean = net.encode(pose, pose_2d)
    again = net.decode(mean + 0.2 * noise, pose_2d)
    expected = (again - pose).norm(dim=-1).sum(1).mean()
    torch.testing.assert_close(terms["recon_3d"], expected)
    torch.testing.assert_close(terms["generator"], net.energy(again, pose_2d).mean())
    unit = mean / mean.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).square()
    torch.testing.assert_close(terms["pulling_away"], (cosines.sum() - 8) / (8 * 7))
    assert discriminated is not None
    real, fake = net.energy(pose, pose_2d), net.energy(again, pose_2d)
    torch.testing.assert_close(discriminated, real.mean() + (2.0 - fake).relu().mean())
    made.new_seed()
    drawn = net.sample_latents(pose_2d, 5, made.new_seed(), False)
    poses = net.decode(drawn, pose_2d)
    error = (poses - pose[:, None]).norm(dim=-1).sum(-1)
    order = error[:, :4].argsort(1)[:, :2]
    best = torch.stack([poses[b, order[b]].mean(0) for b in range(8)])
    expected = (best - pose).norm(dim=-1).sum(1).mean() + error[:, 4].mean()
    torch.testing.assert_close(terms["bidirectional"], expected, rtol=1e-4, atol=1e-4)


def test_terms_of_the_second_phase() -> None:
    made, persons = recipe(), batch()
    net, pose = made.model, persons.joints_3d
    assert pose is not None
    pose_2d = net.pose_2d(persons)
    terms = made.phase_2(persons)
    made._begin(5, slice(None))
    mean = net.encode(pose, pose_2d)
    latent = mean + 0.2 * made.normal(6)
    torch.testing.assert_close(terms["nll"], net.latent_nll(latent, pose_2d).mean())
    base_mean, _, again = net.base(pose_2d)
    distance = (net.to_base(mean, pose_2d)[0] - base_mean).norm(dim=1).mean()
    torch.testing.assert_close(terms["mode_to_mode"], distance)
    torch.testing.assert_close(terms["recon_2d"], (again - pose_2d).abs().sum(1).mean())


def test_the_bidirectional_loss_is_skipped_in_a_share_of_batches() -> None:
    made, persons = recipe(skip=0.7), batch()
    seen = 0
    for step in range(40):
        made._begin(step * 7919, slice(None))
        seen += "bidirectional" in made.phase_1(persons)[0]
    assert 5 < seen < 20  # 12 expected
    assert "bidirectional" not in recipe(skip=1.0).phase_1(persons)[0]
    plain, discriminated = recipe(adversarial=False, skip=1.0).phase_1(persons)
    assert {*plain} == {"recon_3d"}
    assert discriminated is None


def test_each_phase_changes_its_own_parts(tmp_path: Path) -> None:
    # One step of the first phase; then one of the second, resumed.
    def parts(net: ProPose) -> dict[str, list[torch.Tensor]]:
        return {
            "pilgd": [p.detach().clone() for p in net.pilgd_parameters()],
            "discriminator": [p.detach().clone() for p in net.discriminator.parameters()],
            "pagd": [p.detach().clone() for p in net.pagd_parameters()],
            "flow": [p.detach().clone() for p in net.flow.parameters()],
        }

    def changed(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> set[str]:
        return {k for k in a if not all(map(torch.equal, a[k], b[k]))}

    options = {"phase_1_steps": 1, "schedule": "constant"}
    made = recipe(steps=1, **options)
    before = parts(made.model)
    run(made, tmp_path, progress=False)
    after = parts(made.model)
    assert changed(before, after) == {"pilgd", "discriminator"}
    second = recipe(steps=2, **options)
    run(second, tmp_path, resume=True, progress=False)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    second.load_state_dict(state)
    assert changed(after, parts(second.model)) == {"pagd", "flow"}


def test_training_and_resuming(tmp_path: Path) -> None:
    options = {"schedule": "constant"}
    whole = run(recipe(**options), tmp_path / "a", progress=False)
    run(recipe(steps=4, **options), tmp_path / "b", progress=False)
    again = run(recipe(**options), tmp_path / "b", resume=True, progress=False)
    assert isinstance(whole, ProPose)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    persons = source().sample(3, 0, "test")
    loaded = ProPose.from_pretrained(tmp_path / "a" / "model")
    found = loaded.hypotheses(persons, 3).joints_3d
    assert torch.equal(found, whole.hypotheses(persons, 3).joints_3d)


def test_persons_of_other_joints_are_refused() -> None:
    made = recipe()
    with pytest.raises(ValueError, match="persons: expected joint 'pelvis'"):
        made.phase_2(
            PersonBatch(
                **{**batch().tensors(), "joint_names": tuple("abcdefghijklmnopq")},
                detector_names=batch().detector_names,
            )
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase_1_steps": 0}, "phase_1_steps: expected at least 1"),
        ({"best": 5}, "best: expected at most 4"),
        ({"skip": 1.5}, "skip: expected 0 to 1"),
        ({"margin": 0.0}, "margin: expected a positive"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
