"""POCO: heads, uncertainty, density, official checkpoints, hypotheses, curation, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthyp.body import STICK_POINTS
from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data import PersonBatch
from fasthyp.losses import normalised_residual
from fasthyp.metrics.uncertainty import SMPL_PARENTS
from fasthyp.models.poco import (
    POCO,
    ErrorDensity,
    PartAttentionHead,
    POCOConfig,
    ScaleNetwork,
    box_info,
    can_be_infilled,
    chain_uncertainty,
    nearest_rotation,
    rotations,
)
from tests.simulated import source, stick

TINY: dict[str, Any] = {
    **{"features": 20, "hidden": 16, "dropout": 0.0, "scale_hidden": 12, "condition": 8},
    **{"flow_hidden": 10, "part_channels": 6, "shape_channels": 5},
}


def persons(number: int = 4) -> PersonBatch:
    batch = source().sample(number, 1, "test")
    features = torch.randn(number, 20, generator=torch.Generator().manual_seed(2))
    return replace(batch, features=features)


def model(head: str = "cliff", **changes: Any) -> POCO:
    torch.manual_seed(0)
    made = POCO(POCOConfig(**{**TINY, "head": head, **changes}), body=stick()).eval()
    if head != "pare":
        nn.init.xavier_uniform_(made.head.decpose.weight, gain=0.3)
    return made


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["hmr", "cliff"])
def test_an_iterative_head_corrects_its_estimate_three_times(head: str) -> None:
    net = model(head).head
    net.start_at(torch.eye(3).expand(24, 3, 3), torch.arange(10.0), torch.tensor([0.7, 0.1, 0.2]))
    features, box = torch.randn(2, 20), torch.randn(2, 3)
    found = net(features, box)
    seen = [features, box] if head == "cliff" else [features]
    state = torch.cat(
        [
            torch.tensor([1.0, 0, 0, 1, 0, 0]).repeat(24),
            torch.arange(10.0),
            torch.tensor([0.7, 0.1, 0.2]),
        ]
    ).expand(2, -1)
    weight = torch.cat([net.decpose.weight, net.decshape.weight, net.deccam.weight])
    bias = torch.cat([net.decpose.bias, net.decshape.bias, net.deccam.bias])
    for _ in range(3):
        x = torch.cat([*seen, state], 1)
        x = (x @ net.fc1.weight.T + net.fc1.bias) @ net.fc2.weight.T + net.fc2.bias
        state = state + x @ weight.T + bias
    torch.testing.assert_close(found.betas, state[:, 144:154])
    torch.testing.assert_close(found.camera, state[:, 154:])
    # Columns of the rotations, interleaved: the first is along (x0, x2, x4).
    first = state[:, :144].reshape(2, 24, 3, 2)[..., 0]
    torch.testing.assert_close(found.pose[..., 0], first / first.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found.pose.det(), torch.ones(2, 24))


def test_feature_maps_are_averaged() -> None:
    net = model("hmr").head
    maps = torch.randn(2, 20, 3, 4)
    torch.testing.assert_close(net(maps).pose, net(maps.mean((2, 3))).pose)


def test_a_part_is_regressed_from_where_it_is_seen() -> None:
    torch.manual_seed(0)
    net = PartAttentionHead(5, channels=6, shape_channels=4).eval()
    maps = torch.randn(2, 5, 4, 3)
    where = net.attention(maps)
    torch.testing.assert_close(where.sum((2, 3)), torch.ones(2, 24))
    found = net(maps)
    seen = net.body_branch(maps)
    part = 7
    local = torch.stack([(seen * where[:, part, None]).sum((2, 3))[b] for b in range(2)])
    torch.testing.assert_close(found.features.view(2, 6, 24)[:, :, part], local)
    six = torch.stack([net.pose[part] @ row for row in local])
    first = six.view(2, 3, 2)[..., 0]
    torch.testing.assert_close(found.pose[:, part, :, 0], first / first.norm(dim=-1, keepdim=True))
    assert net.segmentation(maps).shape == (2, 25, 4, 3)


def test_the_box_of_cliff() -> None:
    # Its constants: a box of 0.24 focal lengths is at 0, of 0.3 at 1.
    got = box_info(
        torch.tensor([[60.0, 50.0]]),
        torch.tensor([30.0]),
        torch.tensor([[50.0, 50.0]]),
        torch.tensor([100.0]),
    )
    torch.testing.assert_close(got, torch.tensor([[0.28, 0.0, 1.0]]))


def test_projection_of_cliff_is_that_of_the_image() -> None:
    """The person seen where it is: the camera that CLIFF would have to say."""
    net, batch = model("cliff"), persons()
    found = net.predict(batch)
    focal, centre, place = batch.need("focal_length", "centre", "translation")
    side = 64.0
    scale = 2 * focal / (side * place[:, 2])
    shift = place[:, :2] - 2 * (side / 2 - centre) / (scale * side)[:, None]
    camera = torch.cat([scale[:, None], shift], 1)
    found = replace(found, camera=camera)
    joints, expected = batch.need("joints_3d", "joints_2d")
    torch.testing.assert_close(net.translation(found, batch), place, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.joints_2d(found, joints, batch), expected, atol=1e-3, rtol=0)


def test_projection_of_hmr_is_weak_perspective() -> None:
    net = model("hmr")
    found = replace(net.predict(persons()), camera=torch.tensor([[0.8, 0.1, -0.2]]).expand(4, 3))
    points = torch.zeros(4, 2, 3)
    points[:, 1] = torch.tensor([0.5, 0.25, 0.0])
    seen = net.joints_2d(found, points, persons())
    # s (X + t), of half the side of the crop, from its middle; far away, so depth hardly counts.
    expected = 32 + 32 * 0.8 * (points[..., :2] + torch.tensor([0.1, -0.2]))
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=0)


# --- uncertainty ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["reduced", "feat", "feat-pose", "feat-pose-net"])
def test_the_scale_network_sees_the_pose_or_not(inputs: Any) -> None:
    torch.manual_seed(0)
    net = ScaleNetwork(20, inputs, hidden=12)
    features, pose = torch.randn(3, 20), torch.randn(3, 24, 3, 3)
    sigma = net(features, pose)
    assert sigma.shape == (3, 24)
    assert (sigma > 0).all()
    assert (sigma < 1).all()
    moved = net(features, pose + 1)
    assert torch.equal(moved, sigma) == (inputs == "feat")
    reduced = torch.sigmoid(net.feature_net(features)) if inputs == "reduced" else None
    if reduced is not None:
        expected = net.output(torch.cat([reduced, pose.flatten(1)], 1)).sigmoid()
        torch.testing.assert_close(sigma, expected)


def test_dropout_of_the_output_gives_half() -> None:
    torch.manual_seed(0)
    net = ScaleNetwork(20, "feat", 12, dropout=0.5, drop_output=True).train()
    net.output.bias.data.fill_(3.0)
    half = (net(torch.randn(50, 20), torch.zeros(50, 24, 3, 3)) == 0.5).float().mean()
    assert 0.4 < half < 0.6
    net.drop_output = ScaleNetwork(20, "feat", 12, dropout=0.5).drop_output
    assert not (net(torch.randn(50, 20), torch.zeros(50, 24, 3, 3)) == 0.5).any()


def test_the_true_pose_is_shown_to_the_conditioned() -> None:
    net, batch = model("hmr"), persons()
    (features,) = batch.need("features")
    truth = rotations(batch)
    some = torch.tensor([True, False, True, False])
    free, shown = net.predict(batch), net.predict(batch, some)
    torch.testing.assert_close(shown.sigma[1::2], free.sigma[1::2])
    torch.testing.assert_close(shown.sigma[::2], net.scale(features, truth)[::2])
    assert not torch.allclose(shown.sigma[::2], free.sigma[::2])
    torch.testing.assert_close(shown.pose, free.pose)


def test_uncertainty_along_the_skeleton() -> None:
    parts = torch.rand(2, 24)
    expected = torch.zeros(2, 24)
    for part in range(24):
        chain, at = [], part
        while at >= 0:
            chain.append(parts[:, at])
            at = SMPL_PARENTS[at]
        expected[:, part] = torch.stack(chain).mean(0)
    torch.testing.assert_close(chain_uncertainty(parts), expected)
    net = model("hmr")
    found = replace(net.predict(persons(2)), sigma=parts)
    torch.testing.assert_close(net.whole_body_uncertainty(found), expected.mean(1))
    by_joint = net.joint_uncertainty(found)
    assert by_joint.shape == (2, 17)
    for name, chain in (("left_knee", [0, 1, 4]), ("thorax", [0, 3, 6, 9, 12]), ("pelvis", [0])):
        total = parts[:, chain].sum(1)
        torch.testing.assert_close(by_joint[:, H36M17_JOINTS.index(name)], total)
    root = model("hmr", whole_body="root").whole_body_uncertainty(found)
    torch.testing.assert_close(root, torch.where(parts[:, 0] > 0.8, 1.0, parts[:, 0]))


def test_parts_of_nine_scales_are_averaged() -> None:
    net = model("hmr", sigma_dim=9)
    found = net.predict(persons())
    assert found.sigma.shape == (4, 24, 3, 3)
    torch.testing.assert_close(found.part_uncertainty, found.sigma.mean((2, 3)))
    assert net.hypotheses(persons(), 3).joints_3d.shape == (4, 3, 17, 3)


# --- the density of the error --------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_the_density_is_of_normalised_residuals(absolute: bool) -> None:
    torch.manual_seed(0)
    density = ErrorDensity(20, condition=8, hidden=10, absolute=absolute)
    features, pose, truth = torch.randn(2, 20), torch.randn(2, 24, 3, 3), torch.randn(2, 24, 3, 3)
    sigma = torch.rand(2, 24) + 0.1
    got = density.log_prob(features, pose, truth, sigma)
    residual = normalised_residual(pose, truth, sigma, official=absolute)
    assert density.condition is not None
    for person, part in ((0, 0), (1, 13)):
        row = residual[person, part].reshape(1, 9)
        alone = density.flow.log_prob(row, density.condition(features[person : person + 1]))
        torch.testing.assert_close(got[person, part], alone[0])


def test_draws_are_of_the_density() -> None:
    """The latents that draws come from are normal: the flow takes draws back to them."""
    torch.manual_seed(0)
    density = ErrorDensity(20, condition=8, hidden=10)
    features = torch.randn(3, 20)
    drawn = density.draw(features, 400, seed=1)
    assert drawn.shape == (3, 400, 24, 3, 3)
    assert density.condition is not None
    condition = density.condition(features[1:2]).expand(400 * 24, -1)
    z, _ = density.flow.backward_p(drawn[1].reshape(-1, 9), condition)
    assert z.mean(0).abs().max() < 0.05
    assert (z.std(0) - 1).abs().max() < 0.05


def test_without_a_condition_all_images_share_the_density() -> None:
    net = model("hmr", condition=0)
    first = net.hypotheses(persons(), 5).joints_3d
    torch.testing.assert_close(net.hypotheses(persons(), 3).joints_3d, first[:, :3])
    assert net.log_prob(net.predict(persons()), rotations(persons())).shape == (4, 24)


@pytest.mark.parametrize("changes", [{"absolute_residuals": True}, {"flow_dim": 24}])
def test_what_has_no_draws_says_so(changes: dict[str, Any]) -> None:
    net = model("hmr", **changes)
    assert net.hypotheses(persons(), 1).joints_3d.shape == (4, 1, 17, 3)
    with pytest.raises(ValueError, match="num_samples: expected 1"):
        net.hypotheses(persons(), 2)


def test_the_nearest_rotation() -> None:
    matrix = torch.randn(50, 3, 3, dtype=torch.float64)
    found = nearest_rotation(matrix)
    torch.testing.assert_close(found.mT @ found, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(found.det(), torch.ones(50, dtype=torch.float64))
    others = nearest_rotation(torch.randn(200, 3, 3, dtype=torch.float64))
    distance = (found - matrix).square().sum((1, 2))
    best = (others[:, None] - matrix).square().sum((2, 3)).min(0).values
    assert (distance <= best + 1e-12).all()
    near = nearest_rotation(others + 1e-9)
    torch.testing.assert_close(near, others, atol=1e-8, rtol=0)


# --- hypotheses, curation ------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["hmr", "cliff", "pare"])
def test_hypotheses(head: str) -> None:
    batch = persons()
    if head == "pare":
        batch = replace(batch, features=torch.randn(4, 20, 5, 5))
    net = model(head)
    found = net.hypotheses(batch, 6, seed=3, vertices=True)
    assert found.joints_3d.shape == (4, 6, 17, 3)
    assert found.vertices is not None
    assert found.vertices.shape == (4, 6, len(STICK_POINTS), 3)
    assert found.uncertainty is not None
    assert found.uncertainty.shape == (4, 17)
    predicted = net.predict(batch)
    torch.testing.assert_close(found.joints_3d[:, 0], net.joints(predicted.pose, predicted.betas))
    torch.testing.assert_close(found.joints_3d[:, :, 0], torch.zeros(4, 6, 3))
    fewer = net.hypotheses(batch, 3, seed=3)
    torch.testing.assert_close(fewer.joints_3d, found.joints_3d[:, :3])
    assert not torch.allclose(
        net.hypotheses(batch, 3, seed=4).joints_3d[:, 1:], fewer.joints_3d[:, 1:]
    )
    without = net.hypotheses(batch, 5, seed=3, include_mode=False)
    torch.testing.assert_close(without.joints_3d, found.joints_3d[:, 1:])
    last = net.hypotheses(batch[2:], 3, seed=3, image_offset=2, precision="highest")
    torch.testing.assert_close(last.joints_3d, fewer.joints_3d[2:], atol=1e-3, rtol=0)
    # Bones keep their lengths: hypotheses are bodies.
    thigh = (found.joints_3d[:, :, 2] - found.joints_3d[:, :, 1]).norm(dim=-1)
    torch.testing.assert_close(thigh, thigh[:, :1].expand(-1, 6))


def test_curation_keeps_what_is_certain() -> None:
    net, batch = model("cliff"), persons(6)
    sure = net.whole_body_uncertainty(net.predict(batch))
    limit = float(sure.detach().median())
    kept, which = net.curate(batch, keep_below=limit)
    assert torch.equal(which, sure < limit)
    assert len(kept) == int(which.sum()) > 0
    mode = net.hypotheses(batch).joints_3d[:, 0]
    torch.testing.assert_close(kept.joints_3d, mode[which])
    assert kept.betas is not None
    assert kept.joints_2d is not None
    assert kept.mean is not None
    joints, _ = stick()(kept.betas, rotations(kept))
    torch.testing.assert_close(joints - joints[:, :1], kept.joints_3d)
    assert not net.curate(batch)[1].any()  # sigma of an untrained network is about 0.5
    assert torch.equal(net.certain(batch, limit), sure <= limit)
    assert net.certain(batch).all()


@pytest.mark.parametrize(
    ("unsure", "expected"),
    [
        ((), True),
        ((4,), False),
        ((5,), True),
        ((95,), False),
        (range(30, 45), True),
        (range(30, 46), False),
    ],
)
def test_videos_that_can_be_infilled(unsure: Any, expected: bool) -> None:
    uncertainty = torch.full((100,), 0.5)
    uncertainty[list(unsure)] = 0.75
    assert can_be_infilled(uncertainty) == expected


# --- files ----------------------------------------------------------------------------------------


def official(head: str, width: int = 20) -> dict[str, Tensor]:
    """Names and shapes of a checkpoint of POCO's code, at small widths."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int) -> None:
        state[f"model.{name}"] = torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        tensor(f"{name}.weight", outputs, inputs)
        tensor(f"{name}.bias", outputs)

    tensor("backbone.conv1.weight", 4, 3, 3, 3)
    for name, size in (("init_pose", 144), ("init_shape", 10), ("init_cam", 3)):
        tensor(f"head.{name}", 1, size)
    seen, hidden = width, 12
    if head == "pare":
        seen = 24 * 6
        for branch in ("keypoint_deconv_layers", "smpl_deconv_layers"):
            for layer, inputs in ((0, width), (3, 6)):
                tensor(f"head.{branch}.{layer}.weight", 6, inputs, 3, 3)
                for part in ("weight", "bias", "running_mean", "running_var"):
                    tensor(f"head.{branch}.{layer + 1}.{part}", 6)
                state[f"model.head.{branch}.{layer + 1}.num_batches_tracked"] = torch.tensor(3)
        state["model.head.temperature"] = torch.tensor(1.0)
        for name, channels in (("keypoint_final_layer", 25), ("smpl_final_layer", 5)):
            tensor(f"head.{name}.weight", channels, 6, 1, 1)
            tensor(f"head.{name}.bias", channels)
        linear("head.shape_mlp", 24 * 5, 10)
        linear("head.cam_mlp", 24 * 5, 3)
        tensor("head.pose_mlp.weight", 1, 6, 6, 24, 1, 1)
        linear("uncert_head.uncert_fc1", seen + 216, hidden)
        linear("uncert_head.uncert_fc2", hidden, 24)
    else:
        linear("head.fc1", width + 144 + 13 + (3 if head == "cliff" else 0), 16)
        linear("head.fc2", 16, 16)
        for name, size in (("decpose", 144), ("decshape", 10), ("deccam", 3)):
            linear(f"head.{name}", 16, size)
        linear("uncert_head.uncert_fc_poseNet", 216, hidden)
        linear("uncert_head.uncert_fc_featNet", seen, hidden)
        linear("uncert_head.uncert_fc1", 2 * hidden, 24)
    linear("flow_head.cond_layer", seen, 8)
    row = torch.arange(9) % 2
    state["model.flow_head.flow.mask"] = torch.stack([row, 1 - row]).repeat(3, 1).float()
    for net in "st":
        for layer in range(6):
            for part, inputs, outputs in ((0, 17, 10), (2, 10, 10), (4, 10, 9)):
                linear(f"flow_head.flow.{net}.{layer}.{part}", inputs, outputs)
    tensor("smpl.smpl.v_template", 7, 3)
    state["smpl_native.betas"] = torch.zeros(1, 10)
    return state


@pytest.mark.parametrize("head", ["hmr", "cliff", "pare"])
def test_official_checkpoints(head: str, tmp_path: Path) -> None:
    state = official(head)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "poco.pt")
    net = POCO.from_official(tmp_path / "poco.pt", body=stick(), crop_size=48.0)
    config = net.config
    assert not net.training
    assert config.head == head
    assert config.features == 20
    assert (config.scale_hidden, config.condition, config.flow_layers) == (12, 8, 3)
    assert config.flow_masks == "alter"
    assert config.absolute_residuals
    assert config.crop_size == 48.0
    assert config.scale_input == ("feat-pose" if head == "pare" else "feat-pose-net")
    assert torch.equal(net.density.flow.s[5][2].weight, state["model.flow_head.flow.s.5.2.weight"])
    last = "uncert_fc2" if head == "pare" else "uncert_fc1"
    assert torch.equal(net.scale.output.weight, state[f"model.uncert_head.{last}.weight"])
    if head == "pare":
        assert isinstance(net.head, PartAttentionHead)
        # LocallyConnected2d: out[o, p] = sum_c weight[0, o, c, p, 0, 0] x[c, p]
        weight = state["model.head.pose_mlp.weight"]
        assert torch.equal(net.head.pose[5, 2], weight[0, 2, :, 5, 0, 0])
    else:
        assert torch.equal(net.head.fc1.weight, state["model.head.fc1.weight"])
    batch = persons()
    if head == "pare":
        batch = replace(batch, features=torch.randn(4, 20, 5, 5))
    assert net.hypotheses(batch, 1).joints_3d.shape == (4, 1, 17, 3)
    bare = {
        key.removeprefix("model."): value for key, value in state.items() if "native" not in key
    }
    again = POCO.from_official(bare)
    assert torch.equal(again.scale.output.bias, net.scale.output.bias)


def test_official_checkpoints_with_a_backbone() -> None:
    backbone = nn.Sequential()
    backbone.add_module("conv1", nn.Conv2d(3, 4, 3, bias=False))
    net = POCO.from_official(official("hmr"), backbone=backbone)
    assert net.backbone is backbone
    loaded: Any = backbone.conv1
    assert torch.equal(loaded.weight, official("hmr")["model.backbone.conv1.weight"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.head.fc3.weight", torch.zeros(2), "unknown tensor 'head.fc3.weight'"),
        ("model.other", torch.zeros(2), "unknown tensor 'other'"),
        ("elsewhere", torch.zeros(2), "unknown tensor 'elsewhere'"),
        ("model.head.fc2.bias", None, "'head.fc2.bias' is missing"),
        ("model.head.fc2.bias", torch.zeros(3), r"'head.fc2.bias': expected \(16,\), got \(3,\)"),
        ("model.flow_head.flow.mask", torch.ones(6, 9), "no masks of POCO"),
        ("model.flow_head.flow.mask", None, "'density.flow.mask' is missing"),
        ("model.uncert_head.uncert_fc2.weight", torch.zeros(2, 2), "expected one hidden layer"),
        ("model.head.fc1.weight", torch.zeros(16, 30), "fits no width"),
    ],
)
def test_other_checkpoints_are_refused(key: str, value: Tensor | None, message: str) -> None:
    state = official("cliff")
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(ValueError, match=message):
        POCO.from_official(state)


def test_files(tmp_path: Path) -> None:
    net = model("pare", crop_size=32.0)
    net.save_pretrained(tmp_path)
    again = POCO.from_pretrained(tmp_path, body=stick())
    assert again.config == net.config
    batch = replace(persons(), features=torch.randn(4, 20, 5, 5))
    assert torch.equal(again.hypotheses(batch, 4).joints_3d, net.hypotheses(batch, 4).joints_3d)


def test_files_with_a_trunk(tmp_path: Path) -> None:
    net = POCO(POCOConfig(**TINY, trunk_inputs=20), body=stick(), backbone=nn.Linear(20, 20)).eval()
    net.save_pretrained(tmp_path)
    backbone = nn.Linear(20, 20)
    again = POCO.from_pretrained(tmp_path, body=stick(), backbone=backbone)
    assert not torch.equal(backbone.weight, net.backbone.weight)  # the user's: not saved
    again.backbone = net.backbone
    assert torch.equal(again.hypotheses(persons()).joints_3d, net.hypotheses(persons()).joints_3d)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "spin"}, "head: expected one of hmr, cliff, pare"),
        ({"scale_input": "pose"}, "scale_input: expected one of"),
        ({"scale_activation": "relu"}, "scale_activation: expected one of"),
        ({"sigma_dim": 3}, "sigma_dim: expected 1 or 9"),
        ({"flow_dim": 12}, "flow_dim: expected 9 or 24"),
        ({"whole_body": "max"}, "whole_body: expected"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POCO(**{**TINY, **changes})


def test_bad_calls() -> None:
    net = model("cliff")
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 20\)"):
        net(torch.zeros(2, 19), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="box_info: expected a tensor"):
        net(torch.zeros(2, 20))
    with pytest.raises(ValueError, match=r"box_info: expected shape \(2, 3\)"):
        net(torch.zeros(2, 20), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="truth: expected"):
        net(torch.zeros(2, 20), torch.zeros(2, 3), conditioned=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="persons: expected features"):
        net.hypotheses(replace(persons(), features=None))
    with pytest.raises(ValueError, match="num_samples: expected at least 1"):
        net.hypotheses(persons(), 0)
    with pytest.raises(ValueError, match="body: expected one to pose"):
        POCO(POCOConfig(**TINY)).hypotheses(persons())
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 20, H, W\)"):
        model("pare")(torch.zeros(2, 20))
