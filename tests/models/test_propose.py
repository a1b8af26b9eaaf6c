"""ProPose: its two Gaussians, the flow between them, the discriminator, hypotheses, files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthyp.data import PersonBatch
from fasthyp.losses import mode_to_mode_loss
from fasthyp.models.propose import ConditionalMLP, ProPose, ProPoseConfig, soft_clamp
from tests.simulated import source

TINY: dict[str, Any] = {
    **{"latent": 6, "hidden": 16, "code": 8, "discriminator_latent": 4},
    **{"flow_blocks": 2, "flow_hidden": 10},
}


def persons(number: int = 4) -> PersonBatch:
    return source().sample(number, 1, "test")


@pytest.fixture
def model() -> ProPose:
    """Random weights, large enough that nothing is nearly linear or nearly the identity."""
    torch.manual_seed(0)
    model = ProPose(ProPoseConfig(**TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.fit_standardisation(source().sample(200, 0, "train").joints_3d)
    return model.eval()


def test_two_dimensional_poses_have_no_place_and_no_size(model: ProPose) -> None:
    (mean,) = persons().need("mean")
    flat = model.pose_2d(persons())
    assert flat.shape == (4, 34)
    torch.testing.assert_close(model.normalised(3 * mean + torch.tensor([5.0, -7.0])), flat)
    points = flat.view(4, 17, 2)
    torch.testing.assert_close(points.mean(1), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(points.square().sum(-1).mean(-1), torch.ones(4))


def test_the_soft_clamp() -> None:
    x = torch.tensor([-1e9, -1.0, 0.0, 0.5, 1e9], dtype=torch.float64)
    expected = [-3, 6 / math.pi * math.atan(-1 / 3), 0, 6 / math.pi * math.atan(1 / 6), 3]
    torch.testing.assert_close(soft_clamp(x, 3.0), torch.tensor(expected, dtype=torch.float64))


def test_a_shared_condition_is_a_repeated_one() -> None:
    torch.manual_seed(0)
    net = ConditionalMLP(5, 3, 2, hidden=8, layers=2)
    x, condition = torch.randn(4, 6, 5), torch.randn(4, 3)
    rows = torch.cat([x, condition[:, None].expand(-1, 6, -1)], -1)
    expected = rows
    for k, layer in enumerate(net.layers):
        expected = layer(expected if k == 0 else expected.relu())
    torch.testing.assert_close(net(x, condition), expected)
    torch.testing.assert_close(net(x[:, 0], condition), expected[:, 0])
    with pytest.raises(ValueError, match="layers: expected at least 1"):
        ConditionalMLP(5, 3, 2, layers=0)


def test_the_networks_see_standardised_poses(model: ProPose) -> None:
    pose, pose_2d = persons().joints_3d, model.pose_2d(persons())
    assert pose is not None
    standard = ((pose - model.centre) / model.spread).flatten(1)
    mean = model.encode(pose, pose_2d)
    torch.testing.assert_close(mean, soft_clamp(model.encoder(standard, pose_2d), 3.0))
    decoded = model.decode(mean, pose_2d)
    plain = model.decoder(mean, pose_2d).view(4, 17, 3) * model.spread + model.centre
    torch.testing.assert_close(decoded, plain - plain[:, :1])
    torch.testing.assert_close(decoded[:, 0], torch.zeros(4, 3))
    many = model.decode(mean[:, None].expand(-1, 3, -1), pose_2d)
    torch.testing.assert_close(many, decoded[:, None].expand(-1, 3, -1, -1))
    into, out = model.discriminator
    again = out(into(standard, pose_2d), pose_2d).view(4, 17, 3) * model.spread + model.centre
    distance = (again - pose).norm(dim=-1).sum(-1)
    torch.testing.assert_close(model.energy(pose, pose_2d), distance)


def test_the_likelihood_is_that_of_the_flow_under_the_2d_gaussian(model: ProPose) -> None:
    pose_2d, latent = model.pose_2d(persons()), torch.randn(4, 6)
    mean, sigma, again = model.base(pose_2d)
    code = model.encoder_2d(pose_2d)
    torch.testing.assert_close(again, model.decoder_2d(code))
    first, second = model.project(code).chunk(2, 1)
    torch.testing.assert_close(mean, soft_clamp(first, 3.0))
    torch.testing.assert_close(sigma, soft_clamp(second, 3.0).exp())
    mapped, _ = model.to_base(latent, pose_2d)
    base = torch.distributions.Normal(mean, sigma).log_prob(mapped).sum(1)

    def one(x: Tensor, c: Tensor) -> Tensor:
        return model.to_base(x[None], c[None])[0][0]

    log_det = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda x, c=c: one(x, c), x).slogdet()[1]  # type: ignore[misc]
            for x, c in zip(latent, pose_2d, strict=True)
        ]
    )
    torch.testing.assert_close(
        model.latent_nll(latent, pose_2d), -base - log_det, rtol=1e-4, atol=1e-4
    )


def test_draws_are_of_the_2d_gaussian(model: ProPose) -> None:
    pose_2d = model.pose_2d(persons())
    latent = model.sample_latents(pose_2d, 4000, seed=5, include_mode=False, precision="highest")
    mean, sigma, _ = model.base(pose_2d)
    mapped, _ = model.to_base(latent.flatten(0, 1), pose_2d.repeat_interleave(4000, 0))
    noise = (mapped.view(4, 4000, 6) - mean[:, None]) / sigma[:, None]
    assert noise.mean(1).abs().max() < 0.06
    assert (noise.std(1) - 1).abs().max() < 0.05


def test_the_mode_is_the_image_of_the_2d_mean(model: ProPose) -> None:
    pose_2d = model.pose_2d(persons())
    mode = model.sample_latents(pose_2d, 1, precision="highest")[:, 0]
    mapped, _ = model.to_base(mode, pose_2d)
    assert mode_to_mode_loss(mapped, model.base(pose_2d)[0]) < 1e-4
    found = model.hypotheses(persons(), 1).joints_3d[:, 0]
    torch.testing.assert_close(found, model.decode(mode, pose_2d), atol=1e-4, rtol=1e-3)


def test_hypotheses(model: ProPose) -> None:
    found = model.hypotheses(persons(), 6, seed=3)
    assert found.joints_3d.shape == (4, 6, 17, 3)
    assert found.joint_names == model.config.joint_names
    assert found.log_prob is None
    fewer = model.hypotheses(persons(), 3, seed=3).joints_3d
    torch.testing.assert_close(fewer, found.joints_3d[:, :3])
    other = model.hypotheses(persons(), 3, seed=4).joints_3d
    torch.testing.assert_close(other[:, 0], fewer[:, 0])
    assert not torch.allclose(other[:, 1:], fewer[:, 1:])
    drawn = model.hypotheses(persons(), 3, seed=3, include_mode=False).joints_3d
    torch.testing.assert_close(drawn[:, 1:], fewer[:, 1:])
    assert not torch.allclose(drawn[:, 0], fewer[:, 0])
    # Each person for itself: the first two of four are as alone.
    alone = model.hypotheses(persons()[:2], 3, seed=3).joints_3d
    torch.testing.assert_close(alone, fewer[:2])
    last = model.hypotheses(persons()[2:], 3, seed=3, image_offset=2, precision="highest")
    torch.testing.assert_close(last.joints_3d, fewer[2:], atol=1e-3, rtol=0)


def test_each_part_learns_in_one_phase_alone(model: ProPose) -> None:
    first, second = model.pilgd_parameters(), model.pagd_parameters()
    rest = [*model.flow.parameters(), *model.discriminator.parameters()]
    every = [id(p) for p in (*first, *second, *rest)]
    assert len(set(every)) == len(every)
    assert set(every) == {id(p) for p in model.parameters()}


def test_files(model: ProPose, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = ProPose.from_pretrained(tmp_path)
    assert again.config == model.config
    expected = model.hypotheses(persons(), 4).joints_3d
    assert torch.equal(again.hypotheses(persons(), 4).joints_3d, expected)


def test_fewer_detected_joints(tmp_path: Path) -> None:
    names = source(detector="coco13").detector_names
    net = ProPose(ProPoseConfig(**TINY, detector_names=names))
    batch = source(detector="coco13").sample(3, 0, "test")
    assert net.hypotheses(batch, 2).joints_3d.shape == (3, 2, 17, 3)


def test_bad_calls(model: ProPose) -> None:
    with pytest.raises(ValueError, match="persons: expected mean"):
        model.hypotheses(replace(persons(), mean=None), 2)
    with pytest.raises(ValueError, match="persons: expected detector_names"):
        model.hypotheses(source(detector="coco13").sample(3, 0, "test"), 2)
    with pytest.raises(ValueError, match=r"points: expected shape \(B, 17, 2\)"):
        model.normalised(torch.zeros(3, 16, 2))
    with pytest.raises(ValueError, match=r"pose: expected shape \(..., 17, 3\)"):
        model.encode(torch.zeros(3, 51), torch.zeros(3, 34))
    assert model.hypotheses(persons(), 2, vertices=True).vertices is None
    with pytest.raises(ValueError, match="num_samples"):
        model.hypotheses(persons(), 0)
    with pytest.raises(TypeError, match="unknown setting 'width'"):
        ProPose(width=3)


def test_the_flow_is_fused(model: ProPose) -> None:
    import fasthyp

    assert isinstance(model.flow, nn.Module)
    assert all(row["accelerated"] for row in fasthyp.explain(model.flow).rows)
