"""The papers' equations, each against a formula written out here."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fasthyp
from fasthyp import geometry, losses
from tests.losses.cases import covariances, flags, linear, make, numbers

close = torch.testing.assert_close


# --- likelihoods ---


def test_nll_is_the_density_of_a_normal_distribution() -> None:
    z, log_det = numbers(3, 5), numbers(3)
    base = torch.distributions.MultivariateNormal(torch.zeros(5).double(), torch.eye(5).double())
    exact = -(base.log_prob(z) + log_det)
    nll = losses.negative_log_likelihood
    close(nll(z, log_det, reduction="none"), exact)
    close(nll(z, log_det), exact.mean())
    close(nll(z, log_det, reduction="sum"), exact.sum())
    close(nll(z, log_det, per_dim=True), exact.mean() / 5)
    close(nll(z, log_det, constant=False), exact.mean() - 2.5 * math.log(2 * math.pi))


def test_nll_with_an_adaptive_base_is_equation_10_of_propose() -> None:
    z, log_det = numbers(2, 3, 5), numbers(2, 3)
    mean, std = numbers(2, 3, 5, seed=1), numbers(2, 3, 5, low=0.2, high=3)
    exact = -torch.distributions.Normal(mean, std).log_prob(z).sum(-1) - log_det
    close(losses.negative_log_likelihood(z, log_det, mean, std, reduction="none"), exact)
    only_mean = losses.negative_log_likelihood(z, log_det, mean)
    close(only_mean, losses.negative_log_likelihood(z - mean, log_det))


def test_nll_of_the_valid() -> None:
    z, log_det = numbers(4, 5), numbers(4)
    valid = torch.tensor([True, False, True, False])
    exact = losses.negative_log_likelihood(z[valid], log_det[valid])
    z[1], log_det[3] = torch.nan, torch.inf
    z.requires_grad_()
    value = losses.negative_log_likelihood(z, log_det, valid=valid)
    close(value, exact)
    value.backward()
    assert torch.isfinite(z.grad).all()
    assert not z.grad[1].any()
    nobody = losses.negative_log_likelihood(z, log_det, valid=torch.zeros(4))
    assert nobody == 0
    assert nobody.requires_grad
    assert losses.negative_log_likelihood(numbers(0, 5), numbers(0)) == 0


@pytest.mark.parametrize("each", [True, False])
def test_residual_nll(each: bool) -> None:
    predicted, target = numbers(3, 4, 3, 3), numbers(3, 4, 3, 3, seed=1)
    sigma = numbers(3, 4, 3, 3, low=0.2, high=2) if each else numbers(3, 4, low=0.2, high=2)
    scale = sigma if each else sigma[..., None, None].expand(3, 4, 3, 3)
    exact = {
        "gaussian": torch.distributions.Normal(predicted, scale),
        "laplace": torch.distributions.Laplace(predicted, scale),
    }
    for base, constant in (("gaussian", math.log(2 * math.pi) / 2), ("laplace", math.log(2))):
        density = -exact[base].log_prob(target).mean()
        value = losses.residual_nll(predicted, target, sigma, base=base, constant=True)
        close(value, density)
        value = losses.residual_nll(predicted, target, sigma, base=base)
        close(value, density - constant)
    ours = losses.normalised_residual(predicted, target, sigma)
    close(ours, (target - predicted) / scale)
    theirs = losses.normalised_residual(predicted, target, sigma, official=True)
    close(theirs, ours.abs(), rtol=1e-7, atol=0)
    assert (theirs >= 0).all()


def test_residual_log_likelihood_is_equation_6_of_poco() -> None:
    predicted, target = numbers(3, 4, 3, 3), numbers(3, 4, 3, 3, seed=1)
    sigma, log_prob = numbers(3, 4, low=0.2, high=2), numbers(3, 4)
    ratio = (target - predicted) / sigma[..., None, None]
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(ratio)
    exact = -1e-4 * log_prob.mean() - 1e-2 * log_q.mean() + 1e-4 * sigma.log().mean()
    close(losses.residual_log_likelihood_loss(predicted, target, sigma, log_prob), exact)
    log_q = torch.distributions.Laplace(0.0, 1.0).log_prob(ratio)
    exact = -2 * log_prob.mean() - 3 * log_q.mean() + 5 * sigma.log().mean()
    value = losses.residual_log_likelihood_loss(
        *(predicted, target, sigma, log_prob),
        **{"base": "laplace", "flow_weight": 2, "base_weight": 3, "sigma_weight": 5},
    )
    close(value, exact)
    close(losses.flow_residual_nll(log_prob, sigma), sigma.log().mean() - log_prob.mean())


def test_residuals_of_images_that_do_not_count() -> None:
    predicted, target = numbers(3, 4, 3, 3), numbers(3, 4, 3, 3, seed=1)
    sigma, log_prob = numbers(3, 4, low=0.2, high=2), numbers(3, 4)
    rows, valid = slice(0, 2), torch.tensor([1, 1, 0])
    broken = [t.clone() for t in (predicted, target, sigma, log_prob)]
    broken[1][2], broken[2][2], broken[3][2] = torch.nan, 0, torch.nan
    for t in broken:
        t.requires_grad_()
    p, t, s, q = broken
    for value, exact in (
        (
            losses.residual_nll(p, t, s, valid),
            losses.residual_nll(predicted[rows], target[rows], sigma[rows]),
        ),
        (
            losses.residual_log_likelihood_loss(p, t, s, q, valid),
            losses.residual_log_likelihood_loss(
                predicted[rows], target[rows], sigma[rows], log_prob[rows]
            ),
        ),
        (
            losses.pose_residual_loss(p, t, s, valid),
            losses.pose_residual_loss(predicted[rows], target[rows], sigma[rows]),
        ),
    ):
        close(value, exact)
        gradients = torch.autograd.grad(value, broken, materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in gradients)
    assert losses.pose_residual_loss(p, t, s, torch.zeros(3)) == 0


def test_pose_residual_with_the_true_pose_shown() -> None:
    predicted, target = numbers(3, 4, 3, 3), numbers(3, 4, 3, 3, seed=1)
    sigma, shown = numbers(3, 4, low=0.2, high=2), torch.tensor([False, True, False])
    rest = [0, 2]
    seen = ((predicted[1] - target[1]) ** 2).mean() + sigma[1].mean()
    value = losses.pose_residual_loss(predicted, target, sigma, None, shown)
    close(value, losses.residual_nll(predicted[rest], target[rest], sigma[rest]) + seen)
    value = losses.pose_residual_loss(predicted, target, sigma, None, shown, base="flow")
    close(value, seen)
    # the released configurations' loss does not look at sigma; ours does
    for base in ("gaussian", "laplace", "flow"):
        value = losses.pose_residual_loss(predicted, target, sigma, base=base, official=True)
        close(value, ((predicted - target) ** 2).mean())


def test_image_keypoints_weigh_small_persons_as_much() -> None:
    pixels, truth = 50 * numbers(2, 4, 2), 50 * numbers(2, 4, 2, seed=1)
    confidence = numbers(2, 4, low=0)
    size, box = torch.tensor([[640.0, 480], [1920, 1080]]).double(), torch.tensor([100.0, 900])
    total = 0.0
    for b, n, c in itertools.product(range(2), range(4), range(2)):
        a, t = (2 * float(v[b, n, c]) / float(size[b, c]) - 1 for v in (pixels, truth))
        total += float(confidence[b, n]) * (a - t) ** 2 * float(size[b, c]) / float(box[b])
    value = losses.image_keypoint_loss(pixels, truth, confidence, size, box.double())
    assert float(value) == pytest.approx(total / 16)


# --- pose_inn ---


def test_reconstruction() -> None:
    predicted, target = numbers(2, 3, 6), numbers(2, 3, 6, seed=1)
    distance = (predicted - target).abs()
    close(losses.pose_l1_loss(predicted, target), distance.mean())
    close(losses.pose_l1_loss(predicted, target, reduction="norm"), distance.sum(-1).mean())
    close(losses.pose_l1_loss(predicted, target, reduction="none"), distance.sum(-1))
    assert losses.pose_l1_loss(numbers(0, 6), numbers(0, 6)) == 0
    lengths = ((predicted - target) ** 2).sum(-1)
    joint = losses.joint_distance_loss
    close(joint(predicted, target), lengths.sqrt().sum(-1).mean())  # equations 4 and 13
    close(joint(predicted, target, norm="l1"), distance.sum((-2, -1)).mean())  # equation 6
    close(joint(predicted, target, norm="squared"), lengths.sum(-1).mean())
    close(joint(predicted, target, joints="mean", reduction="none"), lengths.sqrt().mean(-1))


def test_covariance_loss_is_equation_3_and_4() -> None:
    positions = 0.02 * numbers(3, 9, 4, 2)
    target = covariances(3, 4) * numbers(3, 4, 1, 1, low=0.1, high=2)
    total, masked = 0.0, 0
    for b, j in itertools.product(range(3), range(4)):
        spread = torch.cov(positions[b, :, j].T)  # unbiased
        wanted = target[b, j] * 0.01**2  # 10 mm for a pixel
        if max(float(target[b, j, 0, 0]), float(target[b, j, 1, 1])) <= 2.1**2:
            masked += 1
            continue
        square = (wanted[0, 1] - spread[0, 1]) ** 2
        for k in range(2):
            square = square + max(0.0, float(wanted[k, k] - spread[k, k])) ** 2
        total += float(square.sqrt())
    assert 0 < masked < 12
    assert float(losses.heatmap_covariance_loss(positions, target)) == pytest.approx(total / 12)


def test_covariance_loss_is_one_sided_in_the_variances() -> None:
    target = torch.eye(2).double()[None, None] * 9
    wide = numbers(1, 50, 1, 2)
    wide = wide - wide.mean(1, keepdim=True)
    wide[..., 1] -= wide[..., 0] * (wide[..., 0] * wide[..., 1]).sum() / (wide[..., 0] ** 2).sum()
    assert float(losses.heatmap_covariance_loss(wide, target)) < 1e-14
    narrow = wide * 1e-3
    value = losses.heatmap_covariance_loss(narrow, target)
    assert float(value) == pytest.approx(math.sqrt(2) * 9e-4, rel=1e-2)
    tilted = wide @ torch.tensor([[1.0, 0.5], [0.0, 1]]).double()
    assert float(losses.heatmap_covariance_loss(tilted, target)) > 0.1  # two-sided there


def test_covariance_of_two_hypotheses() -> None:
    target = 9 * torch.eye(2).double()[None, None]
    pair = torch.tensor([[[[0.01, 0.0]], [[-0.01, 0.0]]]]).double()  # variance 2e-4 along x
    exact = torch.tensor([9e-4 - 2e-4, 9e-4]).double().norm()
    close(losses.heatmap_covariance_loss(pair, target), exact, rtol=1e-6, atol=0)


def test_covariance_official_is_the_papers_for_uncertain_joints() -> None:
    """Doubled standard deviations at 5 mm a pixel are single ones at 10 mm."""
    positions = 0.02 * numbers(2, 9, 4, 2)
    target = covariances(2, 4) + 5 * torch.eye(2).double()
    paper = losses.heatmap_covariance_loss(positions, target)
    doubled = 4 * target / 20**2
    close(losses.heatmap_covariance_loss(positions, doubled, official=True), paper)


def test_pose_inn_positions() -> None:
    poses = numbers(2, 5, 48)
    joints = poses.unflatten(-1, (3, 16))
    ours = losses.pose_inn_positions(poses)
    assert ours.shape == (2, 5, 13, 2)
    root = (joints[..., :2, 0] + joints[..., :2, 3]) / 2
    close(ours[..., 0, :], joints[..., :2, 2] - root)  # right foot
    close(ours[..., 6, :], joints[..., :2, 9] - root)  # head
    close(ours[..., 12, :], joints[..., :2, 12] - root)  # left wrist


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("root", [None, (0,), (0, 2)])
def test_best_of_m_is_equation_8(k: int, norm: str, root: tuple[int, ...] | None) -> None:
    hypotheses, target = numbers(2, 7, 4, 3), numbers(2, 4, 3, seed=1)

    def centred(pose: Tensor) -> Tensor:
        return pose if root is None else pose - pose[list(root)].mean(0)

    total = 0.0
    for b in range(2):
        truth = centred(target[b])
        poses = [centred(pose) for pose in hypotheses[b]]
        poses.sort(key=lambda pose: float((pose - truth).norm(dim=1).mean()))
        difference = sum(poses[:k]) / k - truth
        one = difference.abs().mean() if norm == "l1" else difference.norm(dim=1).sum()
        total += float(one) / 2
    options: dict[str, Any] = {"k": k, "norm": norm, "root": root}
    for chunk in (1, 3, 64):
        value = losses.best_of_m_loss(hypotheses, target, chunk=chunk, **options)
        assert float(value) == pytest.approx(total)
    latents = hypotheses.flatten(2).asin()
    leaf, other = (latents.clone().requires_grad_() for _ in range(2))
    value = losses.best_of_m_loss(make(leaf), target, **options)
    streamed = losses.best_of_m_loss_streamed(make, other, target, chunk=2, **options)
    close(streamed, value)
    close(*(torch.autograd.grad(v, z)[0] for v, z in ((value, leaf), (streamed, other))))


def test_best_hypotheses() -> None:
    hypotheses, target = numbers(2, 7, 4, 3), numbers(2, 4, 3, seed=1)
    hypotheses[0, 3], hypotheses[1, 5] = target[0], torch.nan
    errors, indices = losses.best_hypotheses(hypotheses, target, 7, chunk=2)
    assert indices[0, 0] == 3
    assert indices[1, 6] == 5
    assert errors[0, 0] == 0
    close(errors[1, :6], errors[1, :6].sort().values)
    exact = (hypotheses - target[:, None]).norm(dim=-1).mean(-1)
    close(errors, exact.gather(1, indices), equal_nan=True)
    leaf = hypotheses.requires_grad_()
    losses.best_of_m_loss(leaf, target, k=2).backward()
    touched = leaf.grad.flatten(2).abs().sum(-1) > 0
    assert touched.sum(1).tolist() == [2, 2]
    assert touched.gather(1, indices[:, :2]).all()
    assert torch.isfinite(leaf.grad).all()


class _Largest(TorchDispatchMode):
    """The most elements that an op returned in a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        known = {v.untyped_storage().data_ptr() for v in inputs}  # views of them are not new
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, value.untyped_storage().nbytes() // 8)
        return result


def test_best_of_m_streams() -> None:
    batch, number, joints, chunk = 3, 400, 4, 8
    latents, target = numbers(batch, number, 12), numbers(batch, joints, 3, seed=1)
    hypotheses = make(latents).requires_grad_()
    held = batch * chunk * joints * 3
    with _Largest() as seen:
        losses.best_of_m_loss(hypotheses, target, k=2, chunk=chunk)
    assert seen.largest <= max(held, batch * number)  # the errors, never all differences
    leaf = latents.clone().requires_grad_()
    with _Largest() as seen:
        losses.best_of_m_loss_streamed(make, leaf, target, k=2, chunk=chunk)
    assert seen.largest <= max(held, batch * number)


def test_latent_mmd_is_unbiased_and_blocks_y() -> None:
    output, target = numbers(6, 5).requires_grad_(), numbers(6, 5, seed=1)
    value = losses.latent_mmd_loss(output, target, blocked=3)

    def kernel(a: Tensor, b: Tensor) -> float:
        square = float(((a - b) ** 2).sum())
        return sum(b / (b + square) for b in (0.0025, 0.04, 0.81))  # equation 10

    n = 6
    xs, ys = output.detach(), target
    pairs = [(i, j) for i in range(n) for j in range(n)]
    exact = (
        sum(kernel(xs[i], xs[j]) + kernel(ys[i], ys[j]) for i, j in pairs if i != j) / (n * (n - 1))
        - 2 * sum(kernel(xs[i], ys[j]) for i, j in pairs) / n**2
    )
    assert float(value.detach()) == pytest.approx(exact)
    (gradient,) = torch.autograd.grad(value, output)
    assert not gradient[:, 2:].any()
    assert gradient[:, :2].all()
    biased = losses.latent_mmd_loss(output, target, blocked=3, official=True)
    assert biased.detach() > value.detach()


def test_gradient_penalty() -> None:
    real, fake = numbers(4, 6), numbers(4, 6, seed=1)
    alpha = numbers(4, low=0)
    points = alpha[:, None] * real + (1 - alpha[:, None]) * fake
    exact = 10 * ((2 / 3 * points.norm(dim=1) - 1) ** 2).mean()  # the slope of |x|^2 / 3
    close(losses.gradient_penalty(linear, real, fake, alpha), exact)
    close(losses.gradient_penalty(linear, real, fake, alpha[:, None], weight=5), exact / 2)
    with torch.no_grad():
        close(losses.gradient_penalty(linear, real, fake, alpha), exact)
    drawn = [
        losses.gradient_penalty(linear, real, fake, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]

    def flat(x: Tensor) -> Tensor:
        return 0 * x.sum(1)

    assert losses.gradient_penalty(flat, real, fake, alpha) == 10
    scores = (numbers(4, 1), numbers(3, 1))
    close(losses.critic_loss(*scores), scores[1].mean() - scores[0].mean())
    close(losses.generator_loss(scores[0]), -scores[0].mean())


def test_kinematic_chain_space() -> None:
    layer = losses.KCSLayer([(0, 1), (1, 2)], joints=3).double()
    pose = torch.tensor([[0.0, 1, 1, 0, 0, 2, 0, 0, 0]]).double()  # (0,0,0), (1,0,0), (1,2,0)
    close(layer(pose), torch.tensor([[[1.0, 0], [0, 4]]]).double())
    assert not losses.KCSLayer().state_dict()


# --- HUMR ---


def test_joint_validity() -> None:
    confidence = torch.tensor([[0.1, 0.15, 0.4, 0.4, 0.4, 0.4, 0.6, 0.7, 0.9]])
    articulated = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 1, 1]])
    in_box = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1]])
    in_crop = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1, 1]])
    validity = losses.joint_validity(confidence, articulated, in_box, in_crop)
    assert validity.sampled.int().tolist() == [[0, 0, 1, 0, 0, 0, 0, 0, 0]]
    assert validity.counted.int().tolist() == [[1, 1, 1, 0, 1, 0, 1, 1, 1]]


def test_heatmap_mmd() -> None:
    predicted, samples = numbers(2, 5, 4, 2), numbers(2, 6, 4, 2, seed=1)
    keypoints, sampled, counted = numbers(2, 4, 2), flags(2, 4), flags(2, 4, seed=3)
    validity = losses.JointValidity(sampled, counted)
    exact = torch.zeros(2, 4).double()
    for b, j in itertools.product(range(2), range(4)):
        if counted[b, j]:
            target = keypoints[b, j].repeat(6, 1)
            if sampled[b, j]:
                target[1:] = samples[b, 1:, j]
            exact[b, j] = fasthyp.mmd2(predicted[b, :, j], target)
    value = losses.heatmap_mmd_loss(predicted, samples, keypoints, validity, reduction="none")
    close(value, exact)
    close(losses.heatmap_mmd_loss(predicted, samples, keypoints, validity), exact.mean())
    broken = samples.clone()
    broken[:, 0] = torch.nan  # never a target
    broken[~sampled[:, None].expand(2, 6, 4)] = torch.nan
    wild = predicted.clone()
    wild[~counted[:, None].expand(2, 5, 4)] = torch.nan
    wild.requires_grad_()
    value = losses.heatmap_mmd_loss(wild, broken, keypoints, validity)
    close(value, exact.mean())
    value.backward()
    assert torch.isfinite(wild.grad).all()
    nobody = losses.JointValidity(sampled, torch.zeros_like(counted))
    assert losses.heatmap_mmd_loss(wild * torch.nan, broken, keypoints, nobody) == 0
    unbiased = losses.heatmap_mmd_loss(
        predicted, samples, keypoints, validity, estimator="unbiased"
    )
    assert unbiased < value.detach()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (7, 5), (3, 12)]))
def test_off_mask_is_the_distance_to_every_pixel(seed: int, size: tuple[int, int]) -> None:
    height, width = size
    mask = numbers(2, height, width, seed=seed) > 0.2
    points = numbers(2, 40, 2, seed=seed, low=-1, high=max(size))
    points[:, ::4] = points[:, ::4].round()
    points[0, 0] = torch.tensor([width - 1.0, height - 1.0])
    for b in range(2):
        pixels = mask[b].nonzero().flip(-1).double()
        distance = torch.full((40,), torch.inf).double()
        if len(pixels):
            distance = (points[b, :, None] - pixels).norm(dim=-1).amin(1)
        inside = (points[b] >= 0).all(1) & (points[b, :, 0] <= width - 1)
        inside &= points[b, :, 1] <= height - 1
        assert torch.equal(losses.off_mask(points, mask)[b], inside & (distance >= 0.71))
    assert not losses.off_mask(torch.full((2, 1, 2), torch.nan), mask).any()


def test_mask_loss() -> None:
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True

    def place(x: float, y: float) -> list[float]:
        return [x / 5 - 1, y / 5 - 1]

    # three joints: off the mask, on it, outside of the image
    joints = [place(8, 8), place(3, 3), place(12, 3)]
    predicted = torch.tensor([[joints, joints]]).double().requires_grad_()
    targets = torch.tensor(
        [[[place(4, 4), place(8, 7), place(3, 3)], [place(7, 5), place(8, 8), place(3, 3)]]]
    ).double()
    usable, hidden = torch.ones(1, 2, 3), torch.ones(1, 3)
    arguments = (predicted, targets, usable, mask, hidden)
    # the nearest of the joint's own: (7, 5), at (1 + 3) / 5
    close(losses.mask_loss(*arguments), torch.tensor(0.8).double())
    # of all joints': (8, 8) of the second joint
    assert losses.mask_loss(*arguments, official=True) == 0
    close(losses.mask_loss(*arguments, reduction="none"), torch.full((1, 2), 0.8).double())
    (gradient,) = torch.autograd.grad(losses.mask_loss(*arguments), predicted)
    close(gradient[0, 0], torch.tensor([[0.5, 0.5], [0, 0], [0, 0]]).double())
    usable[0, 1, 0] = 0
    close(losses.mask_loss(*arguments), torch.tensor(1.6).double())  # (4, 4) is left
    for official in (False, True):
        nothing = losses.mask_loss(
            predicted, targets, torch.zeros(1, 2, 3), mask, hidden, official=official
        )
        assert nothing == 0
        (gradient,) = torch.autograd.grad(nothing, predicted)
        assert torch.isfinite(gradient).all()
    hidden[0, 0] = 0
    assert losses.mask_loss(*arguments) == 0
    assert losses.mask_loss(predicted[:, :0], *arguments[1:]) == 0


def test_keypoint_and_parameter_losses() -> None:
    predicted, target = numbers(2, 3, 4, 3), numbers(2, 4, 3, seed=1)
    confidence = numbers(2, 4, low=0)
    confidence[0, 1] = 0
    moved = predicted - predicted[:, :, [1, 2]].mean(2, keepdim=True)
    there = target - target[:, [1, 2]].mean(1, keepdim=True)
    for norm, power in (("l1", 1), ("l2", 2)):
        error = (moved - there[:, None]).abs() ** power * confidence[:, None, :, None]
        value = losses.keypoint_loss(predicted, target, confidence, norm=norm, root=(1, 2))
        close(value, error.sum((-2, -1)))
    each = target[:, None].expand(2, 3, 4, 3)
    close(losses.keypoint_loss(predicted, each), losses.keypoint_loss(predicted, target))
    target[0, 1] = torch.nan
    predicted.requires_grad_()
    value = losses.keypoint_loss(predicted, target, confidence)
    (gradient,) = torch.autograd.grad(value.sum(), predicted)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    truth, valid = numbers(2, 4, 3, seed=1), torch.tensor([1, 0])
    error = ((predicted - truth[:, None]) ** 2).sum((-2, -1))
    close(losses.parameter_loss(predicted, truth), error)
    close(losses.parameter_loss(predicted, truth, valid), error * valid[:, None])
    close(losses.parameter_loss(predicted[..., 0, 0], truth[:, 0, 0]).shape, (2, 3))


def test_mode_and_expectation() -> None:
    values = numbers(3, 4)
    mode, others = losses.mode_and_expectation(values)
    close(mode, values[:, 0].sum() / 3)
    close(others, values[:, 1:].sum() / 9)
    mode, others = losses.mode_and_expectation(values, torch.tensor([1, 0, 1]))
    close(mode, values[[0, 2], 0].mean())
    close(others, values[[0, 2], 1:].mean())
    one = values[:, :1].clone().requires_grad_()
    mode, others = losses.mode_and_expectation(one)
    assert others == 0
    (gradient,) = torch.autograd.grad(mode + others, one)
    close(gradient, torch.full((3, 1), 1 / 3).double())
    mode, others = losses.mode_and_expectation(one, official=True)
    assert torch.isfinite(mode)
    assert others.isnan()
    close(losses.mode_and_expectation(values, official=True)[1], values[:, 1:].mean())
    close(losses.camera_scale_loss(values), ((-10 * values).exp() ** 2).mean())


def test_orthonormality() -> None:
    angle = torch.tensor([0.3, 1.0]).double()
    aa = torch.stack((angle, -angle, 2 * angle), dim=-1)
    rotation = geometry.axis_angle_to_matrix(aa)
    for convention in geometry.ROTATION_6D:
        six = geometry.matrix_to_rotation_6d(rotation, convention)
        assert float(losses.orthonormality_loss(six, convention=convention).max()) < 1e-30
        longer = losses.orthonormality_loss(2 * six.flatten(), convention=convention)
        close(longer, torch.tensor((9 + 9) / 4).double())  # (4 - 1)^2 twice, of four entries
    six = torch.tensor([1.0, 0, 0, 0.5, 1, 0]).double()
    close(losses.orthonormality_loss(six), torch.tensor((0 + 2 * 0.25 + 0.0625) / 4).double())
    interleaved = six.reshape(2, 3).T.flatten()
    close(
        losses.orthonormality_loss(interleaved, convention="interleaved"),
        losses.orthonormality_loss(six),
    )


# --- ProHMR ---


def test_prior_losses() -> None:
    real, fake = numbers(4, 25), numbers(6, 25, seed=1)
    close(losses.prior_loss(fake), ((fake - 1) ** 2).sum() / 6)
    close(losses.prior_loss(fake, 2), ((fake - 1) ** 2).sum() / 2)
    exact = ((real - 1) ** 2).sum() / 4 + (fake**2).sum() / 6
    close(losses.discriminator_loss(real, fake), exact)


def test_discriminator_sees_each_joint_alone() -> None:
    torch.manual_seed(0)
    network = losses.PosePriorDiscriminator(8).double()
    pose, betas = numbers(2, 23, 3, 3), numbers(2, 10)
    scores = network(pose, betas)
    assert scores.shape == (2, 25)
    pose[:, 5] += 1
    changed = (network(pose, betas) - scores).abs() > 1e-12
    assert changed[0].nonzero().flatten().tolist() == [5, 24]
    changed = (network(pose, betas + 1) - network(pose, betas)).abs() > 1e-12
    assert changed[0].nonzero().flatten().tolist() == [23]


def test_geman_mcclure() -> None:
    residual = torch.tensor([0.0, 1e-4, 3, -3, 1e30], dtype=torch.float64)
    exact = [0, 1e-8, 36 / 13, 36 / 13, 4]
    value = losses.geman_mcclure(residual, sigma=2.0)
    close(value, torch.tensor(exact, dtype=torch.float64), rtol=1e-8, atol=0)
    small = torch.tensor(1e-3, requires_grad=True)
    value = losses.geman_mcclure(small, sigma=100.0)
    assert float(value) == pytest.approx(1e-6, rel=1e-6)  # no cancellation in float32
    large = torch.tensor(1e20, requires_grad=True)
    value = losses.geman_mcclure(large, sigma=100.0)
    assert float(value) == pytest.approx(1e4)
    assert torch.isfinite(torch.autograd.grad(value, large)[0])


def test_fitting_objectives() -> None:
    joints, keypoints = numbers(2, 3, 3), 100 * numbers(2, 3, 2)
    confidence = numbers(2, 3, low=0)
    translation = torch.tensor([[0.1, 0.2, 5], [0, 0, 4]]).double()
    focal, center = torch.tensor([[500.0, 510], [600, 610]]).double(), numbers(2, 2)
    size = torch.tensor([[480.0, 640], [1080, 720]]).double()
    z, betas = numbers(2, 4), numbers(2, 5)
    total = 16 * float((z**2).sum()) + 36 * float((betas**2).sum())
    for b, n, c in itertools.product(range(2), range(3), range(2)):
        point = joints[b, n] + translation[b]
        at = float(focal[b, c] * point[c] / point[2] + center[b, c])
        square = (at - float(keypoints[b, n, c])) ** 2
        robust = 1e4 * square / (1e4 + square)
        total += (1000 / float(size[b].max()) * float(confidence[b, n])) ** 2 * robust
    arguments = (joints, keypoints, confidence, translation, focal, center, size, z, betas)
    assert float(losses.keypoint_fitting_loss(*arguments)) == pytest.approx(total)
    less = losses.keypoint_fitting_loss(*arguments, pose_weight=0, shape_weight=1.0)
    assert float(less) == pytest.approx(
        total - 16 * float((z**2).sum()) - 35 * float((betas**2).sum())
    )
    close(losses.flow_prior(z), (z**2).sum(1))
    body = numbers(3, 4, 3, 3)
    views = numbers(3, 6)
    exact = 300**2 * ((body - body.mean(0)) ** 2).sum() + (views**2).sum()
    close(losses.multiview_consistency_loss(body, views), exact)
    same = body[:1].expand(3, 4, 3, 3)
    close(losses.multiview_consistency_loss(same, views, prior_weight=2), 4 * (views**2).sum())
    assert losses.multiview_consistency_loss(body[:0], views[:0]) == 0


# --- ProPose ---


def test_energy_based_losses_are_equation_11() -> None:
    real, fake = numbers(5, low=0), numbers(7, low=0, high=2)
    exact = real.mean() + torch.stack([(1.2 - f).clamp(min=0) for f in fake]).mean()
    close(losses.energy_discriminator_loss(real, fake, margin=1.2), exact)
    close(losses.energy_generator_loss(fake), fake.mean())


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_pulling_away_term(shape: tuple[int, int]) -> None:
    codes = numbers(*shape)
    total = sum(
        float(codes[i] @ codes[j] / codes[i].norm() / codes[j].norm()) ** 2
        for i, j in itertools.permutations(range(shape[0]), 2)
    )
    exact = total / (shape[0] * (shape[0] - 1))
    assert float(losses.pulling_away_term(codes)) == pytest.approx(exact)
    assert float(losses.pulling_away_term(codes[:1].expand(6, -1))) == pytest.approx(1)
    assert float(losses.pulling_away_term(torch.eye(4))) == 0
    assert float(losses.pulling_away_term(codes[:1])) == pytest.approx(0)
    assert float(losses.pulling_away_term(codes[:0])) == 0


def test_mode_to_mode_and_random_selection() -> None:
    a, b = numbers(4, 3), numbers(4, 3, seed=1)
    close(losses.mode_to_mode_loss(a, b), ((a - b) ** 2).sum(1).sqrt().mean())
    one, two = (torch.tensor(v, requires_grad=True) for v in (2.0, 3.0))
    select = losses.bidirectional_loss
    assert select(one, two, torch.tensor(0.3), threshold=0.3) == 5
    left_out = select(one, two, torch.tensor(0.29), threshold=0.3)
    assert left_out == 0
    assert torch.autograd.grad(left_out, one)[0] == 0
    assert torch.autograd.grad(select(one, two, threshold=0), two)[0] == 1
    generator = torch.Generator().manual_seed(0)
    drawn = [float(select(one, two, threshold=0.3, generator=generator)) for _ in range(2000)]
    assert set(drawn) == {0.0, 5.0}
    assert drawn.count(0.0) / 2000 == pytest.approx(0.3, abs=0.04)  # 4 standard deviations
