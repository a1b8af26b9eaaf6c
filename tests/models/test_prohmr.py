"""ProHMR's models: the official code's numbers and checkpoints, and the contract of hypotheses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthyp.body import LinearBody
from fasthyp.body.joint_maps import COCO17_JOINTS, H36M17_JOINTS, SMPL24_JOINTS
from fasthyp.geometry import matrix_to_rotation_6d, rotation_6d_to_matrix
from fasthyp.losses import PosePriorDiscriminator
from fasthyp.metrics import kmeans
from fasthyp.models import BodyJoints, ProHMR, ProHMRLifting
from fasthyp.models.flow_model import root_joints
from fasthyp.models.prohmr import FCResNet, ProHMRConfig, ProHMRLiftingConfig
from tests.body import synthetic_models
from tests.conftest import Golden, golden_files
from tests.models.random_persons import FEATURES, numbers, persons, rotations, smpl

SMALL: dict[str, Any] = {
    **{"context_features": 16, "hidden_features": 20, "num_layers": 2},
    **{"num_blocks_per_layer": 2, "head_features": 14},
}
LIFTING: dict[str, Any] = {
    **{"keypoint_names": COCO17_JOINTS, "joint_names": H36M17_JOINTS[1:]},
    **{"context_features": 16, "hidden_features": 20, "num_layers": 2, "trunk_features": 24},
}


def perturbed(model: nn.Module) -> Any:
    """The module in eval mode with weights that matter; those of flows start near zero."""
    with torch.no_grad():
        for seed, (name, value) in enumerate(sorted(model.state_dict().items())):
            if name.startswith("body.") or not value.is_floating_point():
                continue
            value.add_(0.05 * numbers(*value.shape, seed=seed).abs())
        for name, value in model.state_dict().items():
            if name.endswith("initialized"):
                value.fill_(True)
    return model.eval()


def prohmr(**changes: Any) -> ProHMR:
    return perturbed(ProHMR(body=smpl(), **{**SMALL, "trunk_inputs": FEATURES, **changes}))


def lifting() -> ProHMRLifting:
    return perturbed(ProHMRLifting(**LIFTING))


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the official code's modules are nested."""
    return {f"flow.{name}": value for name, value in state.items()}


def glow_shapes(dims: int, hidden: int, context: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The state dict of nkolot/nflows' ConditionalGlow with two residual blocks."""
    shapes: dict[str, tuple[int, ...]] = {"_transform.dummy_buffer": ()}
    pairs = dims * (dims - 1) // 2
    for layer in range(layers):
        norm, linear, coupling = (f"_transform._transforms.{3 * layer + k}." for k in range(3))
        for prefix in (norm, linear, coupling):
            shapes[f"{prefix}dummy_buffer"] = ()
        shapes |= {f"{norm}log_scale": (dims,), f"{norm}shift": (dims,), f"{norm}initialized": ()}
        shapes |= {f"{linear}{name}_entries": (pairs,) for name in ("lower", "upper")}
        shapes |= {f"{linear}bias": (dims,), f"{linear}unconstrained_upper_diag": (dims,)}
        half = dims // 2
        for name in ("identity_features", "transform_features"):
            shapes[f"{coupling}{name}"] = (half,)
        net = f"{coupling}transform_net."
        shapes[f"{net}initial_layer.weight"] = (hidden, half + context)
        shapes[f"{net}initial_layer.bias"] = (hidden,)
        shapes |= {f"{net}final_layer.weight": (half, hidden), f"{net}final_layer.bias": (half,)}
        for block in range(2):
            for k in range(2):
                norms = f"{net}blocks.{block}.batch_norm_layers.{k}."
                linears = f"{net}blocks.{block}.linear_layers.{k}."
                shapes |= {f"{linears}weight": (hidden, hidden), f"{linears}bias": (hidden,)}
                for name in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{norms}{name}"] = (hidden,)
                shapes[f"{norms}num_batches_tracked"] = ()
    return shapes


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state = {name: 0.1 * numbers(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    for name, value in state.items():
        if name.endswith("initialized"):
            state[name] = torch.tensor(True)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = 1 + value.abs()
        elif name.endswith(("identity_features", "transform_features")):
            first = name.endswith("transform_features") ^ (
                int(name.split("_transforms.")[1][:1]) > 2
            )
            state[name] = torch.arange(int(first), 2 * len(value), 2)
    return state


# --- the official code's numbers ---


@pytest.mark.parametrize("path", golden_files("prohmr_losses_total.npz"))
def test_official_results(path: Path) -> None:
    g = Golden(path)
    model = ProHMR.from_official({"state_dict": official(g.state_dict())})
    assert model.config.head_features == g.meta["fc_features"]
    assert model.config.context_features == g.meta["context"]
    assert model.config.num_layers == g.meta["num_layers"]
    model = model.double()
    found = model.decode(g["in/z"].double(), g["in/feats"].double())
    close = {"rtol": 0.0, "atol": 1e-9}
    torch.testing.assert_close(found.pose_6d, g["out64/pred_pose_6d"], **close)
    torch.testing.assert_close(found.rotations[:, :, :1], g["out64/pred_global_orient"], **close)
    torch.testing.assert_close(found.rotations[:, :, 1:], g["out64/pred_body_pose"], **close)
    torch.testing.assert_close(found.log_prob, g["out64/log_prob"], rtol=1e-9, atol=1e-6)
    for s in range(g["in/z"].shape[1]):  # shape and camera are the same for all hypotheses
        torch.testing.assert_close(found.betas, g["out64/pred_betas"][:, s], **close)
        torch.testing.assert_close(found.camera, g["out64/pred_cam"][:, s], **close)
    log_prob, z = model.log_prob(found.pose_6d, g["in/feats"].double())
    torch.testing.assert_close(log_prob, found.log_prob, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(z, g["in/z"].double(), rtol=0, atol=1e-8)


def test_projection_is_that_of_the_official_code() -> None:
    model, joints, camera = prohmr(), numbers(2, 3, 5, 3), torch.tensor([[0.8, 0.1, 0.2]] * 2)
    moved = joints + torch.tensor([0.1, 0.2, 2 * 5000 / (224 * 0.8 + 1e-9)])
    official = 5000 / 224 * moved[..., :2] / moved[..., 2:]  # in crops, from -0.5 to 0.5
    torch.testing.assert_close(model.project(joints, camera), 2 * official)


# --- checkpoints ---


def checkpoint(context: int = 16, hidden: int = 20, layers: int = 2) -> dict[str, Tensor]:
    shapes = {f"flow.flow.{k}": v for k, v in glow_shapes(144, hidden, context, layers).items()}
    shapes |= {
        "flow.fc_head.init_cam": (1, 1, 3),
        "flow.fc_head.init_betas": (1, 1, 10),
        "flow.fc_head.layers.0.weight": (14, context),
        "flow.fc_head.layers.0.bias": (14,),
        "flow.fc_head.layers.2.weight": (13, 14),
        "flow.fc_head.layers.2.bias": (13,),
        "backbone.weight": (context, FEATURES),
        "backbone.bias": (context,),
        "smpl.v_template": (120, 3),
        "initialized": (),
    }
    discriminator = PosePriorDiscriminator(8).state_dict()
    shapes |= {f"discriminator.{name}": tuple(v.shape) for name, v in discriminator.items()}
    return tensors(shapes)


def test_loads_the_official_layout(tmp_path: Path) -> None:
    state = checkpoint()
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    backbone, discriminator = nn.Linear(FEATURES, 16), PosePriorDiscriminator(8)
    model = ProHMR.from_official(path, backbone=backbone, discriminator=discriminator)
    assert not model.training
    for name, value in SMALL.items():
        assert getattr(model.config, name) == value
    own = model.saved_state()
    flow_and_head = {name: value for name, value in state.items() if name.startswith("flow.")}
    assert {f"flow.{name}" for name in own} == flow_and_head.keys()
    for name, value in flow_and_head.items():
        torch.testing.assert_close(own[name.removeprefix("flow.")], value)
    torch.testing.assert_close(backbone.weight.detach(), state["backbone.weight"])
    torch.testing.assert_close(
        discriminator.betas_fc1.weight.detach(), state["discriminator.betas_fc1.weight"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow.flow._transform.surprise": ()}, "unknown tensor 'flow._transform.surprise'"),
        ({"head.weight": (2, 2)}, "unknown tensor 'head.weight'"),
        ({"flow.fc_head.layers.2.bias": (12,)}, r"layers.2.bias.*\(13,\), got \(12,\)"),
        ({"flow.fc_head.layers.0.weight": None}, "layers.0.weight' is missing"),
        ({"flow.flow._transform._transforms.0.shift": None}, "shift' is missing"),
        ({"backbone.bias": None}, "backbone: tensor 'bias' is missing"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    state = checkpoint()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        ProHMR.from_official(state, backbone=nn.Linear(FEATURES, 16))


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        ProHMR.from_official(path)
    with pytest.raises(ValueError, match="epoch: expected a tensor"):
        ProHMR.from_official({"epoch": 3})


def test_loads_the_official_lifting_layout() -> None:
    shapes = {f"flow.flow.{k}": v for k, v in glow_shapes(48, 20, 16, 2).items()}
    widths = {0: [(34, 24)], 1: [(24, 24)] * 2, 2: [(24, 24)] * 2, 3: [(24, 16)]}
    for block, layers in widths.items():
        for k, (inputs, outputs) in enumerate(layers):
            linear, norm = (f"backbone.fc_layers.{block}.fc_block.{4 * k + i}." for i in (0, 1))
            shapes |= {f"{linear}weight": (outputs, inputs), f"{linear}bias": (outputs,)}
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{norm}{name}"] = (outputs,)
            shapes[f"{norm}num_batches_tracked"] = ()
    state = tensors({**shapes, "initialized": ()})
    mean, std = numbers(17, 2), 1 + numbers(17, 2, seed=1).abs()
    model = ProHMRLifting.from_official(state, mean, std)
    config = model.config
    assert (config.trunk_features, config.trunk_blocks, config.context_features) == (24, 2, 16)

    # the context, written out
    keypoints = numbers(3, 17, 2, seed=2)
    x = ((keypoints - mean) / std).flatten(1)
    for block, layers in widths.items():
        h = x
        for k in range(len(layers)):
            w, n = (f"backbone.fc_layers.{block}.fc_block.{4 * k + i}." for i in (0, 1))
            h = h @ state[f"{w}weight"].T + state[f"{w}bias"]
            h = (h - state[f"{n}running_mean"]) / (state[f"{n}running_var"] + 1e-5).sqrt()
            h = (h * state[f"{n}weight"] + state[f"{n}bias"]).relu()
        x = x + h if len(layers) == 2 else h
    batch = persons(3, names=config.keypoint_names)
    batch = type(batch)(**{**vars(batch), "mean": keypoints})
    torch.testing.assert_close(model.condition(batch), x)
    with pytest.raises(ValueError, match=r"unknown tensor 'discriminator\.x'"):
        ProHMRLifting.from_official({**state, "discriminator.x": mean}, mean, std)


# --- defaults, files ---


def test_defaults_are_the_papers() -> None:
    config = ProHMRConfig()
    assert (6 * config.joints, config.num_layers, config.num_blocks_per_layer) == (144, 4, 2)
    assert (config.context_features, config.hidden_features) == (2048, 1024)
    assert (config.head_features, config.dropout) == (1024, 0.5)
    lifting = ProHMRLiftingConfig()
    assert (len(lifting.keypoint_names), 3 * len(lifting.joint_names)) == (17, 48)
    assert (lifting.trunk_features, lifting.trunk_blocks, lifting.context_features) == (
        1024,
        2,
        1024,
    )


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = prohmr(), persons()
    saved = model.save_pretrained(tmp_path / "a")
    again = ProHMR.from_pretrained(saved, body=smpl())
    for name, value in model.hypotheses(batch, 3).__dict__.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(again.hypotheses(batch, 3), name))
    lifter = lifting()
    lifter.fit_standardisation(numbers(50, 17, 2))
    again = ProHMRLifting.from_pretrained(lifter.save_pretrained(tmp_path / "b"))
    assert again.config == lifter.config
    assert torch.equal(again.hypotheses(batch, 3).joints_3d, lifter.hypotheses(batch, 3).joints_3d)


# --- hypotheses ---


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_hypotheses(make: Any) -> None:
    model, batch = make(), persons()
    many, few = model.hypotheses(batch, 8, seed=3), model.hypotheses(batch, 4, seed=3)
    assert many.joints_3d.shape[:2] == (5, 8)
    assert many.joints_3d.shape[2] == len(many.joint_names)
    torch.testing.assert_close(many.joints_3d[:, :4], few.joints_3d)
    torch.testing.assert_close(many.log_prob[:, :4], few.log_prob)
    assert not torch.allclose(few.joints_3d, model.hypotheses(batch, 4, seed=4).joints_3d)
    last = model.hypotheses(batch[3:], 4, seed=3, image_offset=3)
    torch.testing.assert_close(few.joints_3d[3:], last.joints_3d)
    # the mode comes first; nothing is likelier
    assert (many.log_prob[:, :1] > many.log_prob[:, 1:]).all()
    cond = model.condition(batch)
    mode = model.decode(torch.zeros(5, 1, model.dims), cond)
    if isinstance(model, ProHMR):
        joints, log_prob = model.pose(mode)[0][:, 0], mode.log_prob
        joints = joints - joints[:, list(root_joints(model.body.joint_names))].mean(1, keepdim=True)
    else:
        joints, log_prob = nn.functional.pad(mode[0][:, 0], (0, 0, 1, 0)), mode[1]
    torch.testing.assert_close(many.joints_3d[:, 0], joints, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many.log_prob[:, :1], log_prob, rtol=1e-4, atol=1e-3)
    model.train()
    torch.testing.assert_close(model.hypotheses(batch, 4, seed=3).joints_3d, few.joints_3d)
    assert model.training
    assert kmeans(many.joints_3d, 3, seed=0).centres.shape == (5, 3, *many.joints_3d.shape[2:])


def test_joints_are_those_of_the_body() -> None:
    model, batch = prohmr(), persons()
    found = model.hypotheses(batch, 3, seed=1, vertices=True)
    sampled = model.sample(model.condition(batch), 3, seed=1)
    body = model.body.body
    for person in range(5):
        for m in range(3):
            turns = sampled.rotations[person, m][None]
            out = body(
                betas=sampled.betas[person][None],
                global_orient=turns[:, :1],
                body_pose=turns[:, 1:],
                pose2rot=False,
            )
            root = out.joints[:, :1]
            torch.testing.assert_close(
                found.joints_3d[person, m], (out.joints - root)[0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                found.vertices[person, m], (out.vertices - root)[0], rtol=1e-4, atol=1e-5
            )


def test_regressors_of_joints() -> None:
    body = smpl()
    regressor = torch.zeros(2, 120)
    regressor[0, 3], regressor[1, 4:6] = 1.0, 0.5
    named = BodyJoints(body.body, regressor, ("left_hip", "right_hip"))
    turns = rotations(4, 24)
    joints, mesh = named(numbers(4, 10), turns, vertices=True)
    torch.testing.assert_close(joints, regressor @ mesh, rtol=1e-4, atol=1e-5)
    assert root_joints(named.joint_names) == (0, 1)
    with pytest.raises(ValueError, match="joint_names: expected 2, got 1"):
        BodyJoints(body.body, regressor, ("left_hip",))
    with pytest.raises(ValueError, match="joint_names: expected the names"):
        BodyJoints(body.body, regressor)


def test_bodies_without_the_family() -> None:
    """Any skinned body; joints whose rotation is not given rest."""
    arrays = synthetic_models.model(vertices=120)
    body = BodyJoints(LinearBody(arrays))
    assert body.joint_names == SMPL24_JOINTS
    turns, betas = rotations(4, 24), numbers(4, 10)
    turns[:, 22:] = torch.eye(3)
    joints, mesh = body(betas, turns[:, :22], vertices=True)
    theirs, skin = smpl()(betas, turns, vertices=True)
    torch.testing.assert_close(joints, theirs[:, :24], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mesh, skin, rtol=1e-4, atol=1e-5)


def test_density_integrates_over_what_is_drawn() -> None:
    model, batch = prohmr(), persons()
    cond = model.condition(batch)
    drawn = model.sample(cond, 6, seed=0, precision="highest")
    log_prob, z = model.log_prob(drawn.pose_6d, cond)
    torch.testing.assert_close(log_prob, drawn.log_prob, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(model.decode(z, cond).pose_6d, drawn.pose_6d, rtol=1e-3, atol=1e-3)


def test_rotations_go_there_and_back() -> None:
    model, batch = prohmr(), persons()
    true = model.target(batch)
    assert torch.equal(true[:, 0], batch.global_orient)
    six = model.to_6d(true)
    assert torch.equal(six[:, :6], torch.cat([true[:, 0, :, 0], true[:, 0, :, 1]], 1))
    torch.testing.assert_close(rotation_6d_to_matrix(six.unflatten(-1, (24, 6))), true)
    assert torch.equal(six, matrix_to_rotation_6d(true).flatten(1))


@pytest.mark.parametrize("make", [prohmr, lifting])
def test_initialisation_by_data(make: Any) -> None:
    model = make()
    for name, value in model.state_dict().items():
        if name.endswith("initialized"):
            value.fill_(False)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    x, cond = 2 + 3 * numbers(64, model.dims), numbers(64, 16, seed=1)
    model.initialise(x, cond)
    assert not model.training
    first = model.flow._transform._transforms[0]
    assert bool(first.initialized)
    out = first(x)[0]
    torch.testing.assert_close(out.mean(0), torch.zeros(model.dims), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(0), torch.ones(model.dims), rtol=1e-4, atol=0)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.initialise(5 * x, cond)
    assert all(
        torch.equal(value, model.state_dict()[k])
        for k, value in after.items()
        if "tracked" not in k
    )


# --- bad input ---


def test_bad_input() -> None:
    model, batch = prohmr(), persons()
    cond = model.condition(batch)
    with pytest.raises(ValueError, match=r"z: expected shape \(B, M, 144\)"):
        model.decode(torch.zeros(5, 144), cond)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, M, 144\)"):
        model.log_prob(torch.zeros(4, 1, 144), cond)
    with pytest.raises(ValueError, match="body: expected one"):
        ProHMR(**SMALL, trunk_inputs=FEATURES).pose(model.sample(cond, 2))
    with pytest.raises(ValueError, match="persons: expected features"):
        model.condition(type(batch)(mean=batch.mean))
    with pytest.raises(ValueError, match=r"persons.features: expected \(B, 12\), or a backbone"):
        model.condition(type(batch)(features=torch.zeros(2, 3, 8, 8)))
    with pytest.raises(
        ValueError, match=r"persons.features: expected \(B, 2048\).*, got \(5, 12\)"
    ):
        ProHMR(num_layers=1, hidden_features=8).condition(batch)
    with pytest.raises(ValueError, match="expected 'right_ankle' among"):
        ProHMRLifting().condition(type(batch)(mean=batch.mean, detector_names=COCO17_JOINTS[:3]))
    with pytest.raises(TypeError, match="body: expected a LinearBody"):
        BodyJoints(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a pelvis or hips"):
        root_joints(("nose",))


def test_a_backbone_takes_images() -> None:
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16))
    model = perturbed(ProHMR(body=smpl(), backbone=backbone, **SMALL))
    batch = type(persons())(features=numbers(2, 3, 8, 8))
    assert model.hypotheses(batch, 3).joints_3d.shape == (2, 3, 45, 3)
    assert not any(name.startswith(("backbone", "body")) for name in model.saved_state())
    assert isinstance(FCResNet(4, 8, 8), nn.Module)
