"""HUMR's model: the official code's numbers and checkpoints, and the contract of hypotheses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasthyp import losses
from fasthyp.geometry import rotation_6d_to_matrix
from fasthyp.models import HUMR
from fasthyp.models.humr import HUMRConfig, ShapeCameraHead
from tests.conftest import Golden, golden_files
from tests.models.random_persons import FEATURES, numbers, persons, smplx
from tests.models.test_prohmr import perturbed

SMALL: dict[str, Any] = {
    **{"image_features": 10, "blocks": 3, "hidden": 20, "keypoint_hidden": 14},
    **{"keypoint_features": 8, "head_features": 12},
}


def humr(**changes: Any) -> HUMR:
    return perturbed(HUMR(body=smplx(), **{**SMALL, "trunk_inputs": FEATURES, **changes}))


def checkpoint(
    image: int = 10, hidden: int = 20, blocks: int = 3, dims: int = 132, betas: int = 11
) -> dict[str, Tensor]:
    """The tensors of a ``HumrTrainer``, by the names in the official code."""
    cond = image + 8 + 3
    layers = {
        "head.fc1": (12, cond + betas + 3),
        "head.fc2": (12, 12),
        "head.decshape": (betas, 12),
        "head.deccam": (3, 12),
        "joints_enc.0": (14, 51),
        "joints_enc.2": (8, 14),
        "backbone": (image, FEATURES),
    }
    for block in range(blocks):
        for k in (1, 2):
            subnet = f"flow.module_list.{2 * block}.subnet{k}"
            widths = ((hidden, dims // 2 + cond), (hidden, hidden), (dims, hidden))
            layers |= {f"{subnet}.{3 * i}": width for i, width in enumerate(widths)}
    shapes: dict[str, tuple[int, ...]] = {"head.init_shape": (1, betas), "head.init_cam": (1, 3)}
    for name, width in layers.items():
        shapes |= {f"{name}.weight": width, f"{name}.bias": width[:1]}
    names = {f"model.{name}": shape for name, shape in shapes.items()}
    state = {name: 0.1 * numbers(*shape, seed=k) for k, (name, shape) in enumerate(names.items())}
    for block in range(blocks):
        perm = torch.from_numpy(np.random.RandomState(block + 5).permutation(dims))
        state[f"model.flow.module_list.{2 * block + 1}.perm"] = perm
        state[f"model.flow.module_list.{2 * block + 1}.perm_inv"] = perm.argsort()
    for name in ("model.smpl.smplx.v_template", "smplx.betas", "smpl_neutral.faces", "J_regressor"):
        state[name] = torch.zeros(2)
    return state


def test_loads_the_official_layout(tmp_path: Path) -> None:
    state = checkpoint()
    path = tmp_path / "humr.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    backbone = nn.Linear(FEATURES, 10)
    model = HUMR.from_official(path, backbone=backbone)
    assert not model.training
    for name, value in {**SMALL, "betas": 11, "joints": 22, "keypoints": 17}.items():
        assert getattr(model.config, name) == value
    own = model.saved_state()
    parts = ("model.head.", "model.joints_enc.", "model.flow.")
    loaded = {name: value for name, value in state.items() if name.startswith(parts)}
    assert {f"model.{name}" for name in own} == loaded.keys()
    for name, value in loaded.items():
        assert torch.equal(own[name.removeprefix("model.")], value)
    assert torch.equal(backbone.weight, state["model.backbone.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.surprise": (1,)}, "unknown tensor 'model.surprise'"),
        ({"model.flow.module_list.9.perm": (132,)}, "unknown tensor 'flow.module_list.9.perm'"),
        ({"model.head.deccam.bias": (4,)}, r"deccam.bias.*\(3,\), got \(4,\)"),
        ({"model.head.decshape.weight": None}, "decshape.weight' is missing"),
        ({"model.flow.module_list.1.perm": None}, "perm' is missing"),
        ({"model.backbone.bias": None}, "backbone: tensor 'bias' is missing"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    state = checkpoint()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        HUMR.from_official(state, backbone=nn.Linear(FEATURES, 10))


@pytest.mark.parametrize("path", golden_files("humr_losses_nll.npz"))
def test_official_flow(path: Path) -> None:
    g = Golden(path)
    width = g.meta["cond"]
    sizes = {"blocks": g.meta["blocks"], "image_features": width - 11, "keypoint_features": 8}
    hidden = g["sd/module_list.0.subnet1.0.weight"].shape[0]
    model = HUMR(**{**SMALL, **sizes, "hidden": hidden})
    assert model.config.condition_features == width
    model.flow.load_state_dict(g.state_dict())
    model = model.double().eval()
    cond = g["in/cond"].double()
    found = model.decode(g["in/z"].double(), cond)
    torch.testing.assert_close(found.pose_6d, g["out64/pred_pose_6d"], rtol=0, atol=1e-9)
    # what the official code calls log_prob: the negative one per dimension, without the constant
    theirs = -found.log_prob / 132 - losses.nll.LOG_2PI / 2
    torch.testing.assert_close(theirs, g["out64/log_prob"], rtol=0, atol=1e-9)
    log_prob, z = model.log_prob(g["in/gt_pose_6d"][:, None].double(), cond)
    loss = losses.negative_log_likelihood(
        z, log_prob + 0.5 * (z.square().sum(-1) + 132 * losses.nll.LOG_2PI),
        per_dim=True, constant=False,
    )  # fmt: skip
    weight = losses.HUMR_WEIGHTS["nll"]
    torch.testing.assert_close(weight * loss, g["out64/loss_nll"], rtol=0, atol=1e-9)


def test_condition_and_camera_written_out() -> None:
    """As ``Humr.forward`` and ``SMPLXCamHead``, for a crop of 64 pixels about (32, 32)."""
    model, batch = humr(trunk_inputs=0, image_features=FEATURES), persons()
    cond = model.condition(batch)
    assert cond.shape == (5, FEATURES + 8 + 3)
    assert torch.equal(cond[:, :FEATURES], batch.features)
    keypoints = torch.cat([2 * batch.mean / 64 - 1, batch.amplitude[..., None]], -1)
    torch.testing.assert_close(cond[:, FEATURES:-3], model.joints_enc(keypoints.flatten(1)))
    width, height = (2 * batch.centre).unbind(-1)
    box = torch.stack([32 - width / 2, 32 - height / 2, torch.full((5,), 64.0)], -1)
    torch.testing.assert_close(cond[:, -3:], box / batch.focal_length[:, None])

    joints, camera = numbers(5, 2, 4, 3), numbers(5, 3, seed=1).abs() + 0.5
    s, tx, ty = camera.unbind(-1)
    tz = 2 * batch.focal_length / (64 * s)
    cx, cy = 2 * (32 - width / 2) / (s * 64), 2 * (32 - height / 2) / (s * 64)
    moved = joints + torch.stack([tx + cx, ty + cy, tz], -1)[:, None, None]
    pixels = batch.focal_length[:, None, None, None] * moved[..., :2] / moved[..., 2:]
    pixels = pixels + batch.centre[:, None, None]
    torch.testing.assert_close(model.project(joints, camera, batch), 2 * (pixels - 32) / 64)


def test_head_written_out() -> None:
    head = perturbed(ShapeCameraHead(7, 9, 11, 3, 0.5))
    cond = numbers(4, 7)
    shape, camera = head.init_shape.repeat(4, 1), head.init_cam.repeat(4, 1)
    for _ in range(3):
        x = torch.cat([cond, shape, camera], 1) @ head.fc1.weight.T + head.fc1.bias
        x = x @ head.fc2.weight.T + head.fc2.bias
        shape = x @ head.decshape.weight.T + head.decshape.bias + shape
        camera = x @ head.deccam.weight.T + head.deccam.bias + camera
    torch.testing.assert_close(head(cond), (shape, camera))


def test_defaults_are_the_papers() -> None:
    config = HUMRConfig()
    assert config.condition_features == 979
    assert (6 * config.joints, config.blocks, config.hidden, config.clamp) == (132, 8, 1024, 2.0)
    assert (config.betas, config.keypoints) == (11, 17)


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = humr(), persons()
    again = HUMR.from_pretrained(model.save_pretrained(tmp_path), body=smplx())
    assert torch.equal(again.hypotheses(batch, 3).joints_3d, model.hypotheses(batch, 3).joints_3d)


def test_hypotheses() -> None:
    model, batch = humr(), persons()
    many, few = model.hypotheses(batch, 8, seed=3), model.hypotheses(batch, 4, seed=3)
    assert many.joints_3d.shape == (5, 8, 33, 3)
    torch.testing.assert_close(many.joints_3d[:, :4], few.joints_3d)
    torch.testing.assert_close(many.log_prob[:, :4], few.log_prob)
    assert not torch.allclose(few.joints_3d, model.hypotheses(batch, 4, seed=4).joints_3d)
    cond = model.condition(batch)
    mode = model.decode(torch.zeros(5, 1, 132), cond)
    joints = model.pose(mode)[0][:, 0]
    torch.testing.assert_close(many.joints_3d[:, 0], joints - joints[:, :1], rtol=1e-4, atol=1e-5)
    # rows of the matrices, and the SMPL-X body written out
    torch.testing.assert_close(
        mode.rotations, rotation_6d_to_matrix(mode.pose_6d.unflatten(-1, (22, 6)), "rows")
    )
    turns = mode.rotations[:, 0]
    out = model.body.body(
        betas=mode.betas, global_orient=turns[:, :1], body_pose=turns[:, 1:], pose2rot=False
    )
    torch.testing.assert_close(
        joints, torch.cat([out.joints[:, :22], out.joints[:, 55:66]], 1), rtol=1e-4, atol=1e-5
    )
    mesh = model.hypotheses(batch, 2, vertices=True).vertices
    torch.testing.assert_close(mesh[:, 0], out.vertices - out.joints[:, :1], rtol=1e-4, atol=1e-5)
    true = model.target(batch)
    assert true.shape == (5, 22, 3, 3)
    torch.testing.assert_close(model.to_6d(true)[:, :6], true[:, 0, :2].flatten(1))


def test_bad_input() -> None:
    model, batch = humr(), persons()
    short = persons(names=batch.detector_names[:13])
    with pytest.raises(ValueError, match=r"persons\.mean: expected 17 keypoints, got 13"):
        model.condition(short)
    with pytest.raises(ValueError, match="persons: expected focal_length"):
        model.condition(type(batch)(mean=batch.mean, amplitude=batch.amplitude))
    few = type(batch)(global_orient=batch.global_orient, body_pose=batch.body_pose[:, :5])
    with pytest.raises(ValueError, match=r"persons\.body_pose: expected at least 21 joints, got 5"):
        model.target(few)
