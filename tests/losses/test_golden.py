"""The losses against the official implementations, values and gradients, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import Tensor

from fasthyp import geometry, losses
from fasthyp.flows import ConditionalGlow
from tests.conftest import Golden, _Subnets, golden_files

one_file = pytest.mark.parametrize


class Doubles(Golden):
    """A golden file with float32 arrays as float64: the official float64 runs took those."""

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value.double() if value.dtype == torch.float32 else value

    def leaf(self, name: str) -> Tensor:
        return self[name].requires_grad_()

    def check(self, value: Tensor, name: str, tolerance: float = 1e-9) -> None:
        """``value`` is the float64 array of that name, to ``tolerance`` of its largest element."""
        kind, rest = name.split("/", 1)
        exact = self[f"{kind}64/{rest}" if f"{kind}64/{rest}" in self.names else name]
        assert value.shape == exact.shape, name
        scale = max(float(exact.abs().max()), 1e-30)
        worst = float((value.detach() - exact).abs().max()) / scale
        assert worst <= tolerance, f"{name}: off by {worst:.1e}"

    def check_gradient(
        self, value: Tensor, leaf: Tensor, name: str, tolerance: float = 1e-9
    ) -> None:
        (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
        self.check(gradient, name, tolerance)


# --- pose_inn ---


def pose_inn_joints(poses: Tensor) -> Tensor:
    """(..., 48) -> (..., 16, 3)."""
    return poses.unflatten(-1, (3, 16)).mT


@one_file("path", golden_files("w21_losses_bestofm.npz"))
def test_best_of_m(path: Path) -> None:
    g = Doubles(path)
    k, weight = g.meta["TOP_K"], losses.POSE_INN_WEIGHTS["best_of_m"]
    assert weight == g.meta["lambd_mb"]
    leaf, target = g.leaf("in/x_pred_hypos"), pose_inn_joints(g["in/x"])
    hypotheses = pose_inn_joints(leaf.transpose(0, 1))
    options: dict[str, Any] = {"root": losses.POSE_INN_ROOT, "chunk": 7}
    everything = hypotheses.shape[1]
    errors, indices = losses.best_hypotheses(hypotheses, target, everything, **options)
    # the official errors are in mm and count the root, which is always right
    g.check(
        torch.empty_like(errors).scatter_(1, indices, errors).T * 1000 * 16 / 17, "out/errors_mpjpe"
    )
    assert torch.equal(indices, g["out/indices"])
    loss = weight * losses.best_of_m_loss(hypotheses, target, k=k, official=True, **options)
    g.check(loss, "out/loss_mb")
    g.check_gradient(loss, leaf, "grad/x_pred_hypos")

    def generate(latents: Tensor) -> Tensor:
        return pose_inn_joints(latents)

    streamed = weight * losses.best_of_m_loss_streamed(
        generate, leaf.transpose(0, 1), target, k=k, official=True, **options
    )
    g.check(streamed, "out/loss_mb")
    g.check_gradient(streamed, leaf, "grad/x_pred_hypos")


@one_file("path", golden_files("w21_losses_bestofm.npz"))
def test_forward_losses(path: Path) -> None:
    g = Doubles(path)
    output = g.leaf("in/output")
    target = torch.cat((g["in/z_target"], g["in/y2d"]), dim=1)
    l2d = losses.pose_l1_loss(output[:, -32:], target[:, -32:])
    mmd = losses.latent_mmd_loss(output, target, official=True)
    weights = losses.POSE_INN_WEIGHTS
    assert weights["mmd"] == g.meta["lambd_mmd"]
    g.check(l2d, "out/loss_2d")
    g.check(weights["mmd"] * mmd, "out/loss_mmd")
    total = losses.weighted_sum({"l2d": l2d, "mmd": mmd}, weights)
    g.check_gradient(total, output, "grad/output")


@one_file("path", golden_files("w21_losses_covariance.npz"))
def test_heatmap_covariance(path: Path) -> None:
    g = Doubles(path)
    leaf = g.leaf("in/poses_3d")
    positions = losses.pose_inn_positions(leaf.permute(1, 0, 2, 3).flatten(2))
    x, y, xy = (g[f"in/gt_{name}"] for name in ("var_x", "var_y", "cov"))
    covariance = torch.stack((torch.stack((x, xy), -1), torch.stack((xy, y), -1)), -1)
    loss = losses.heatmap_covariance_loss(positions, covariance, official=True)
    g.check(loss, "out/loss")
    g.check_gradient(loss, leaf, "grad/poses_3d")


@one_file("path", golden_files("w21_losses_critic.npz"))
def test_critic(path: Path) -> None:
    g = Doubles(path)
    critic = losses.PoseCritic(g.meta["hidden"]).double()
    critic.load_state_dict(g.state_dict())
    assert torch.equal(critic.kcs_layer.matrix, g["in/kcs_C"])
    real, fake = g.leaf("in/real"), g["in/fake"]
    g.check(critic.kcs_layer(real), "out/kcs")
    scores = critic(real)
    g.check(scores, "out/out")
    g.check(losses.generator_loss(scores), "out/d_real")
    g.check(-losses.generator_loss(critic(fake)), "out/d_fake")
    both = losses.critic_loss(scores, critic(fake))
    torch.testing.assert_close(both, g["out64/d_real"] + g["out64/d_fake"])
    g.check_gradient(scores.mean(), real, "grad/real")
    penalty = losses.gradient_penalty(critic, real, fake, g["in/alpha"], weight=g.meta["gp_lambda"])
    g.check(penalty, "out/gp")
    for name, parameter in critic.named_parameters():
        g.check_gradient(scores.mean(), parameter, f"grad/sd/{name}", 1e-6)  # float32 arrays
        if name != "fc9.bias":  # which the slope does not depend on
            (gradient,) = torch.autograd.grad(
                penalty, parameter, retain_graph=True, materialize_grads=True
            )
            g.check(gradient, f"ggp/sd/{name}", 1e-6)


# --- HUMR ---


@one_file("path", golden_files("humr_losses_b?s*.npz"))
def test_humr(path: Path) -> None:
    g = Doubles(path)
    size, weights, options = g.meta["hparams"]["IMG_RES"], losses.HUMR_WEIGHTS, g.meta["hparams"]
    names = {
        **{"keypoints_2d_mode": "KEYPOINTS_2D_MODE", "heatmap_mmd": "KEYPOINTS_2D_HM_SAMPLE"},
        **{"mask": "LOCATION_MASK", "betas_mode": "BETAS_MODE"},
        **{"orthonormality_mode": "ORTHOGONAL", "orthonormality_exp": "ORTHOGONAL"},
    }
    assert all(weights[ours] == options[theirs] for ours, theirs in names.items())
    coco = g.meta["coco17_from_joints2d"]
    leaves = {k: g.leaf(f"in/{k}") for k in ("joints2d", "pred_pose_6d", "pred_cam", "pred_betas")}
    center, side = g["in/center"][:, None], 200 * g["in/scale"][:, None, None]

    def normed(points: Tensor, each: bool) -> Tensor:
        return (
            2 * (points - (center[:, None] if each else center)) / (side[:, None] if each else side)
        )

    predicted = normed(leaves["joints2d"], True)
    number = predicted.shape[1] - 1
    keypoints, crop = g["in/gtkps_coco"][..., :2], g["in/coco_inside_square_crop"]
    confidence, annotated = g["in/hm_max_confs"], g["in/keypoints_orig"]
    samples = normed(g["in/hm_samples_orig"][:, :number], True)
    validity = losses.joint_validity(
        *(confidence, g["in/valid_sample_joints"], g["in/coco_gt_bbox_inside"], crop),
        low=options["HM_SAMPLE_MIN_TH"],
        high=options["HM_SAMPLE_MAX_TH"],
    )
    random = predicted[:, 1:, coco]
    mask = torch.zeros(len(center), size, size, dtype=torch.bool)
    pixels = g["in/mask_indices"].long()
    mask[torch.arange(len(center))[:, None], pixels[..., 1], pixels[..., 0]] = True
    hidden = ((confidence < 0.5) | ~crop) & g["in/valid_mask"][:, None]
    orthonormality = losses.mode_and_expectation(losses.orthonormality_loss(leaves["pred_pose_6d"]))
    keypoint_errors = losses.keypoint_loss(
        predicted[:, :, :24], normed(annotated[..., :2], False), annotated[..., 2]
    )
    terms = {
        "keypoints_2d_mode": losses.mode_and_expectation(keypoint_errors)[0],
        "heatmap_mmd": losses.heatmap_mmd_loss(random, samples, keypoints, validity),
        "betas_mode": losses.mode_and_expectation(
            losses.parameter_loss(leaves["pred_betas"], g["in/betas"])
        )[0],
        "orthonormality_mode": orthonormality[0],
        "orthonormality_exp": orthonormality[1],
        "camera": losses.camera_scale_loss(leaves["pred_cam"][..., 0]),
        "mask": losses.mask_loss(
            random,
            torch.cat((samples, keypoints[:, None]), dim=1),
            torch.cat(
                (~g["in/samples_outside_mask"][:, :number], torch.ones_like(crop)[:, None]), 1
            ),
            mask,
            hidden,
            official=True,
        ),
    }
    assert all(terms[name] > 0 for name in terms)
    total = losses.weighted_sum(terms, weights)
    for ours, theirs in {
        **{"keypoints_2d_mode": "keypoints_mode", "heatmap_mmd": "samples2d_exp"},
        **{"betas_mode": "betas_mode", "orthonormality_mode": "pose_6d_mode"},
        **{"orthonormality_exp": "pose_6d_exp", "camera": "cam", "mask": "mask"},
    }.items():
        g.check(weights[ours] * terms[ours], f"out/loss_{theirs}")
    g.check(total, "out/loss")
    for name, leaf in leaves.items():
        g.check_gradient(total, leaf, f"grad/{name}")
    joints = leaves["joints2d"]
    for ours, theirs, tolerance in (
        ("keypoints_2d_mode", "keypoints_mode", 1e-6),
        ("heatmap_mmd", "samples2d_exp", 3e-4),  # the peer's float32, from inner products
        ("mask", "mask", 1e-6),
    ):
        g.check_gradient(weights[ours] * terms[ours], joints, f"gterm/loss_{theirs}", tolerance)


@one_file("path", golden_files("humr_losses_misc.npz"))
def test_humr_keypoints(path: Path) -> None:
    g = Doubles(path)
    truth = g["in/gt_kp"]
    for norm in ("l1", "l2"):
        leaf = g.leaf("in/pred_kp")
        value = losses.keypoint_loss(leaf, truth[..., :2], truth[..., 2], norm=norm)
        g.check(value, f"out/kp2d_{norm}")
        g.check_gradient(value.sum(), leaf, f"grad/kp2d_{norm}", 1e-6)
    intrinsics = g["in/K"]
    focal = torch.stack((intrinsics[:, 0, 0], intrinsics[:, 1, 1]), -1)
    assert not intrinsics[:, 0, 1].any()
    projected = geometry.perspective_projection(
        g["in/points"], g["out64/cam_t"], focal, intrinsics[:, :2, 2]
    )
    g.check(projected, "out/proj2d")


def humr_flow(g: Doubles) -> ff.GraphINN:
    nodes = [ff.InputNode(132, name="input")]
    condition = ff.ConditionNode(g.meta["cond"])
    for k in range(g.meta["blocks"]):
        subnets = _Subnets(g.state_dict(), f"module_list.{2 * k}.")
        arguments = {"clamp": 2.0, "subnet_constructor": subnets}
        nodes.append(ff.Node(nodes[-1], fm.GLOWCouplingBlock, arguments, condition))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": k}))
    flow = ff.GraphINN([*nodes, ff.OutputNode(nodes[-1], name="output"), condition])
    flow.load_state_dict(g.state_dict())
    return flow.double().eval()


@one_file("path", golden_files("humr_losses_nll.npz"))
def test_humr_nll(path: Path) -> None:
    g = Doubles(path)
    flow, weight = humr_flow(g), losses.HUMR_WEIGHTS["nll"]
    assert weight == g.meta["LOSS_WEIGHTS_NLL"]
    pose, cond = g.leaf("in/gt_pose_6d"), g.leaf("in/cond")
    options: dict[str, Any] = {"per_dim": True, "constant": False}
    loss = weight * losses.negative_log_likelihood(*flow(pose, c=[cond]), **options)
    g.check(loss, "out/loss_nll")
    g.check_gradient(loss, pose, "grad/gt_pose_6d")
    g.check_gradient(loss, cond, "grad/cond")
    z = g["in/z"]
    many = cond.repeat_interleave(z.shape[1], 0)
    x, log_det = flow(z.flatten(0, 1), c=[many], rev=True)
    g.check(x.reshape(z.shape), "out/pred_pose_6d")
    log_det = -log_det.reshape(z.shape[:2])
    value = losses.negative_log_likelihood(z, log_det, reduction="none", **options)
    g.check(value, "out/log_prob")


# --- ProHMR ---


@one_file("path", golden_files("prohmr_losses_basic.npz"))
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_prohmr_keypoints(path: Path, norm: str) -> None:
    g = Doubles(path)
    for dims, root in ((2, None), (3, losses.PROHMR_PELVIS)):
        leaf, truth = g.leaf(f"in/pred_kp{dims}d"), g[f"in/gt_kp{dims}d"]
        value = losses.keypoint_loss(leaf, truth[..., :-1], truth[..., -1], norm=norm, root=root)
        g.check(value, f"out/kp{dims}d_{norm}")
        g.check_gradient(value.sum(), leaf, f"grad/kp{dims}d_{norm}")


@one_file("path", golden_files("prohmr_losses_basic.npz"))
def test_prohmr_parameters(path: Path) -> None:
    g = Doubles(path)
    leaf = g.leaf("in/pred_param")
    value = losses.parameter_loss(leaf, g["in/gt_param"], g["in/has_param"])
    exact = g["out64/param"].sum(-1)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    g.check_gradient(value.sum(), leaf, "grad/param")


@one_file("path", golden_files("prohmr_losses_geometry.npz"))
def test_prohmr_geometry(path: Path) -> None:
    g = Doubles(path)
    aa, x6 = g.leaf("in/aa"), g.leaf("in/x6")
    rotations = geometry.axis_angle_to_matrix(aa, official=True)
    g.check(rotations, "out/aa_to_rotmat")
    g.check_gradient((g["in/W_aa"] * rotations).sum(), aa, "grad/aa", 1e-8)
    g.check(geometry.axis_angle_to_matrix(aa), "out/aa_to_rotmat", 1e-7)
    rotations = geometry.rotation_6d_to_matrix(x6)
    g.check(rotations, "out/rot6d_to_rotmat")
    g.check_gradient((g["in/W_6d"] * rotations).sum(), x6, "grad/x6")
    g.check(geometry.quaternion_to_matrix(g["in/q"]), "out/quat_to_rotmat")
    three = g["in/x6_three"]
    g.check(geometry.rotation_6d_to_matrix(three, official=True), "out/rot6d_three", 1e-6)
    right = geometry.rotation_6d_to_matrix(three)
    assert float((right - g["out/rot6d_three"]).abs().max()) > 0.1
    torch.testing.assert_close(right.mT @ right, torch.eye(3).double().expand(3, 3, 3))
    points, translation = g.leaf("in/points"), g.leaf("in/translation")
    projected = geometry.perspective_projection(
        *(points, translation, g["in/focal_length"], g["in/camera_center"], g["in/rotation"])
    )
    g.check(projected, "out/proj")
    g.check_gradient((g["in/W_proj"] * projected).sum(), points, "grad/points")
    g.check_gradient((g["in/W_proj"] * projected).sum(), translation, "grad/translation")
    plain = geometry.perspective_projection(points, translation, g["in/focal_length"] / 224)
    g.check(plain, "out/proj_plain")


@one_file("path", golden_files("rot_conventions.npz"))
def test_rotation_conventions(path: Path) -> None:
    g = Doubles(path)
    x6, aa = g["in/x6"], g["in/aa"]
    for peer in ("prohmr_aa_to_rotmat", "poco_batch_rodrigues"):
        g.check(geometry.axis_angle_to_matrix(aa, official=True), f"out/{peer}")
    for peer in ("smplx_batch_rodrigues", "poco_batch_rodrigues"):  # 1e-8 added to the angle
        g.check(geometry.axis_angle_to_matrix(aa), f"out/{peer}", 1e-7)
    matrix = geometry.axis_angle_to_matrix(aa)
    g.check(matrix, "out/p3d_axis_angle_to_matrix")
    vectors, theirs = geometry.matrix_to_axis_angle(matrix), g["out64/p3d_matrix_to_axis_angle"]
    half_turns = (theirs.norm(dim=-1) - torch.pi).abs() < 1e-7  # whose axis has either sign
    theirs = torch.where((half_turns & ((vectors * theirs).sum(-1) < 0))[:, None], -theirs, theirs)
    torch.testing.assert_close(vectors, theirs, rtol=0, atol=1e-7)
    for convention, peer, back in (
        ("columns", "prohmr_rot6d", "prohmr_rotmat_to_6d"),
        ("interleaved", "poco_rot6d", None),
        ("rows", "p3d_rotation_6d_to_matrix", "p3d_matrix_to_rotation_6d"),
        ("rows", "p3d_rotation_6d_to_matrix", "poco_matrix_to_rotation_6d"),
    ):
        g.check(geometry.rotation_6d_to_matrix(x6, convention), f"out/{peer}")
        six = geometry.matrix_to_rotation_6d(matrix, convention)
        if back:
            g.check(six, f"out/{back}", 1e-7)
        again = geometry.rotation_6d_to_matrix(six, convention)
        torch.testing.assert_close(again, matrix, rtol=0, atol=1e-12)


@one_file("path", golden_files("prohmr_losses_optim.npz"))
def test_prohmr_fitting(path: Path) -> None:
    g = Doubles(path)
    g.check(losses.geman_mcclure(g["in/err"], sigma=g.meta["sigma"]), "out/gmof")
    joints, translation, z, betas = (
        g.leaf(f"in/{k}") for k in ("model_joints", "camera_translation", "z", "betas")
    )
    value = losses.keypoint_fitting_loss(
        *(joints, g["in/joints_2d"], g["in/joints_conf"][..., 0], translation),
        *(g["in/focal_length"], g["in/camera_center"], g["in/img_size"], z, betas),
    )
    g.check(value, "out/keypoint_fitting_loss")
    for name, leaf in (
        *(("model_joints", joints), ("camera_translation", translation)),
        *(("z", z), ("betas", betas)),
    ):
        g.check_gradient(value, leaf, f"grad/{name}")
    pose = g.leaf("in/body_pose")
    value = losses.multiview_consistency_loss(pose, z)
    g.check(value, "out/multiview_loss")
    g.check_gradient(value, pose, "grad/body_pose")
    g.check_gradient(value, z, "grad/z_multiview")


@one_file("path", golden_files("prohmr_losses_discriminator.npz"))
def test_prohmr_discriminator(path: Path) -> None:
    g = Doubles(path)
    discriminator = losses.PosePriorDiscriminator(g.meta["hidden"]).double()
    discriminator.load_state_dict(g.state_dict())
    poses, betas = g.leaf("in/poses"), g.leaf("in/betas")
    fake = discriminator(poses, betas)
    real = discriminator(g["in/poses_real"].flatten(1), g["in/betas_real"])
    g.check(fake, "out/disc_fake")
    g.check(real, "out/disc_real")
    adversarial = losses.prior_loss(fake)
    g.check(adversarial, "out/loss_adv")
    g.check_gradient(adversarial, poses, "grad/poses")
    g.check_gradient(adversarial, betas, "grad/betas")
    value = losses.discriminator_loss(real, fake)
    g.check(value, "out/loss_disc")
    for name, parameter in discriminator.named_parameters():
        g.check_gradient(adversarial, parameter, f"grad/sd/{name}", 2e-6)
        g.check_gradient(value, parameter, f"gdisc/sd/{name}", 5e-6)


@one_file("path", golden_files("prohmr_losses_total.npz"))
def test_prohmr_total(path: Path) -> None:
    g = Doubles(path)
    meta = g.meta
    sizes = (meta[name] for name in ("hidden", "num_layers", "layer_depth"))
    flow = ConditionalGlow(144, *sizes, context_features=meta["context"])
    state = g.state_dict()
    flow.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("flow.")})
    flow = flow.double().eval()
    feats, z = g.leaf("in/feats"), g.leaf("in/z")
    batch, number = z.shape[:2]

    poses = torch.stack(
        [
            flow.sample_and_log_prob(1, context=feats, noise=z[:, [s]])[0].reshape(batch, 144)
            for s in range(number)
        ],
        dim=1,
    )
    g.check(poses, "out/pred_pose_6d", 1e-8)
    matrices = geometry.rotation_6d_to_matrix(poses.unflatten(-1, (24, 6)))
    head = {k[8:]: v for k, v in state.items() if k.startswith("fc_head.")}
    hidden = (feats @ head["layers.0.weight"].T + head["layers.0.bias"]).relu()
    offset = hidden @ head["layers.2.weight"].T + head["layers.2.bias"]
    betas = (offset[:, None, :10] + head["init_betas"]).expand(-1, number, -1)
    g.check(betas, "out/pred_betas", 1e-8)

    truth = {
        k: geometry.axis_angle_to_matrix(g[f"in/gt_{k}"].unflatten(-1, (-1, 3)), official=True)
        for k in ("global_orient", "body_pose")
    }
    six = [geometry.matrix_to_rotation_6d(truth[k]).flatten(1) for k in truth]
    log_prob, _ = flow.log_prob(torch.cat(six, dim=1), feats)
    has = g["in/has_body_pose"]
    zero = torch.zeros(batch, 1).double()
    joints = {d: g.leaf(f"in/pred_kp{d}d") for d in (2, 3)}
    errors: dict[str, Tensor] = {
        "keypoints_2d": losses.keypoint_loss(
            joints[2], g["in/gt_kp2d"][..., :2], g["in/gt_kp2d"][..., 2]
        ),
        "keypoints_3d": losses.keypoint_loss(
            *(joints[3], g["in/gt_kp3d"][..., :3], g["in/gt_kp3d"][..., 3]),
            root=losses.PROHMR_PELVIS,
        ),
        "global_orient": losses.parameter_loss(
            matrices[:, :, :1], truth["global_orient"], g["in/has_global_orient"]
        ),
        "body_pose": losses.parameter_loss(matrices[:, :, 1:], truth["body_pose"], has),
        "betas": losses.parameter_loss(betas, g["in/gt_betas"], g["in/has_betas"]),
        "orthonormality": losses.orthonormality_loss(poses),
    }
    # log p as the flow has it, so that the latent counts as zero
    terms = {"nll": losses.negative_log_likelihood(zero, log_prob, valid=has > 0, constant=False)}
    for name, value in errors.items():
        terms[f"{name}_mode"], terms[f"{name}_exp"] = losses.mode_and_expectation(value)
    g.check(terms["nll"], "out/loss_nll", 1e-8)
    for name in errors:
        theirs = name.replace("orthonormality", "pose_6d")
        for part in ("mode", "exp"):
            g.check(terms[f"{name}_{part}"], f"out/loss_{theirs}_{part}", 1e-8)
    weights = losses.PROHMR_WEIGHTS
    theirs = {k.lower(): v for k, v in meta["LOSS_WEIGHTS"].items()}
    orthogonal = theirs.pop("orthogonal")
    theirs |= {"orthonormality_mode": orthogonal, "orthonormality_exp": orthogonal}
    assert dict(weights) == theirs
    total = losses.weighted_sum(terms, weights)
    g.check(total, "out/loss", 1e-8)
    g.check_gradient(total, feats, "grad/feats", 1e-8)
    g.check_gradient(total, z, "grad/z", 1e-8)
    for d in (2, 3):
        g.check_gradient(total, joints[d], f"grad/pred_kp{d}d")

    half = (0.5 * z[:, 1]).detach().requires_grad_()
    views, *_ = flow.sample_and_log_prob(1, context=feats, noise=half[:, None])
    body = geometry.rotation_6d_to_matrix(views.reshape(batch, 24, 6))[:, 1:]
    value = losses.multiview_consistency_loss(body, half)
    g.check(value, "out/multiview_loss_half_z1", 1e-8)
    (gradient,) = torch.autograd.grad(value, half)
    g.check(gradient[:, None], "grad/z_multiview", 1e-8)


# --- POCO ---

POCO_BASES = {"norm_flow_res": "laplace", "norm_flow_res_gaus": "gaussian", "norm_flow": "flow"}


@one_file("path", golden_files("poco_losses_smpl_uncertainty.npz"))
@pytest.mark.parametrize("variant", POCO_BASES)
@pytest.mark.parametrize("sigmas", [1, 9])
@pytest.mark.parametrize("case", ["all", "cond"])
def test_poco_pose(path: Path, variant: str, sigmas: int, case: str) -> None:
    g = Doubles(path)
    name = f"{variant}_sigma{sigmas}_{case}"
    predicted, sigma = g.leaf("in/pred_rotmat"), g.leaf(f"in/var_sigma{sigmas}")
    target = geometry.axis_angle_to_matrix(g["in/gt_pose"].unflatten(-1, (24, 3)), official=True)
    has = g["in/has_smpl"]
    shown = torch.zeros(len(predicted), dtype=torch.bool)
    if case == "cond":
        shown[g["in/gt_pose_cond_idx"]] = True
    loss = losses.pose_residual_loss(
        predicted, target, sigma, has, shown, base=POCO_BASES[variant], official=True
    )
    single = variant == "norm_flow" and sigmas == 9  # the peer has no float64 there
    value = loss.reshape(g[f"out64/{name}/pose"].shape)
    g.check(value, f"out/{name}/pose", 1e-7 if single else 1e-9)
    for leaf, end in ((predicted, "pred_rotmat"), (sigma, "var")):
        if g[f"grad64/{name}/{end}"].numel():
            g.check_gradient(loss, leaf, f"grad/{name}/{end}")
        elif loss.requires_grad:
            gradient = torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)
            assert not gradient[0].any()
    plain = losses.residual_nll(predicted, target, torch.ones_like(sigma), has) * 2
    g.check(plain, "out/smpl_losses/pose")
    betas = losses.parameter_loss(g["in/pred_betas"][:, None], g["in/gt_betas"], has)
    g.check(losses.mode_and_expectation(betas, has)[0] / 10, f"out/{name}/betas")


@one_file("path", golden_files("poco_losses_total.npz"))
@pytest.mark.parametrize("case", ["cliff_sigma1", "sigma9_gaus", "sigma9_res_crop"])
def test_poco_total(path: Path, case: str) -> None:
    g = Doubles(path)
    crop = case == "sigma9_res_crop"
    names = {
        **{"pred_pose": "in/pred_pose", "pred_shape": "in/pred_shape", "pred_cam": "in/pred_cam"},
        **{"smpl_joints3d": "in/pred_smpl_joints3d", "log_phi": "in/pred_log_phi"},
        "smpl_joints2d": "in/pred_smpl_joints2d" + "_crop" * crop,
        "var_pose": "in/var_sigma1" if case == "cliff_sigma1" else "in/var_sigma9",
    }
    leaves = {k: g.leaf(v) for k, v in names.items()}
    has, has_3d = g["in/gt_has_smpl"], g["in/gt_has_pose_3d"]
    target = geometry.axis_angle_to_matrix(g["in/gt_pose"].unflatten(-1, (24, 3)), official=True)

    # The file does not name the images of the dual conditioning: those whose sigma counts by its
    # mean alone, but for the flow's term.
    sigma = g[names["var_pose"]].flatten(1)
    flow_slope = losses.POCO_CLIFF_WEIGHTS["flow"] / (has.sum() * sigma.shape[1] * sigma)
    slopes = g[f"grad64/{case}/var_pose"].flatten(1) - flow_slope
    shown = (slopes.std(1) < 1e-9) & (has > 0) & crop
    assert shown.any() == crop

    def per_number(values: Tensor, valid: Tensor, count: int) -> Tensor:
        return losses.mode_and_expectation(values, valid)[0] / count

    truth = g["in/gt_keypoints" if crop else "in/gt_keypoints_fullimg"]
    confidence = truth[..., 2].clone()
    confidence[:, :25] = 0
    if crop:
        errors = losses.keypoint_loss(
            leaves["smpl_joints2d"][:, None], truth[..., :2], confidence, norm="l2"
        )
        keypoints = errors.mean() / (49 * 2)
    else:
        keypoints = losses.image_keypoint_loss(
            *(leaves["smpl_joints2d"], truth[..., :2], confidence),
            *(g["in/gt_orig_shape"].flip(-1), 200 * g["in/gt_scale"]),
        )
    log_prob = torch.full((len(has), 24), torch.nan).double()
    log_prob = log_prob.index_put((has.nonzero()[:, 0],), leaves["log_phi"])
    vertices = losses.keypoint_loss(
        g["in/pred_smpl_vertices"][:, None], g["in/gt_vertices"], norm="l1"
    )
    terms = {
        "keypoints_2d": keypoints,
        "keypoints_3d": per_number(
            losses.keypoint_loss(
                *(leaves["smpl_joints3d"][:, None, 25:], g["in/gt_pose_3d"][..., :3]),
                norm="l2",
                root=losses.SPIN_HIPS,
            ),
            *(has_3d, 72),
        ),
        "pose": losses.pose_residual_loss(
            *(leaves["pred_pose"], target, leaves["var_pose"], has, shown),
            base="laplace" if crop else "gaussian",
            official=True,
        ),
        "betas": per_number(
            losses.parameter_loss(leaves["pred_shape"][:, None], g["in/gt_betas"], has), has, 10
        ),
        "vertices": per_number(vertices, has, 3 * g["in/gt_vertices"].shape[1]),
        "camera": losses.camera_scale_loss(leaves["pred_cam"][:, 0]),
        "flow": losses.flow_residual_nll(log_prob, leaves["var_pose"], has),
    }
    weights = losses.POCO_CLIFF_WEIGHTS
    theirs = {
        **{"keypoints_2d": "keypoints", "keypoints_3d": "keypoints_3d", "pose": "regr_pose"},
        **{"betas": "regr_betas", "vertices": "shape", "camera": "cam", "flow": "nf"},
    }
    for ours, name in theirs.items():
        g.check(weights[ours] / 60 * terms[ours], f"out/{case}/loss_{name}")
    total = losses.weighted_sum(terms, weights)
    g.check(total, f"out/{case}/total_loss")
    for name, leaf in leaves.items():
        g.check_gradient(total, leaf, f"grad/{case}/{name}", 1e-8)


def test_tolerances_mean_something() -> None:
    """A deviation in the seventh digit fails."""
    path = golden_files("prohmr_losses_optim.npz")[0].values[0]
    g = Doubles(path)
    with pytest.raises(AssertionError, match="out/gmof: off by"):
        g.check(losses.geman_mcclure(g["in/err"], sigma=100.0) * (1 + 1e-7), "out/gmof")
    assert math.isclose(g.meta["sigma"], 100.0)
