"""What a trained flow over bodies is a prior for: fitting to 2D keypoints, agreement of several
views, and walks through the latent space.

Kolotouros et al., "Probabilistic Modeling for Human Mesh Recovery", ICCV 2021, sections 3.6 and
4.3, and the ``optimization`` package of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasthyp.losses import keypoint_fitting_loss, multiview_consistency_loss
from fasthyp.losses._base import check_choice
from fasthyp.models.flow_model import BodyFlow, BodyPrediction, evaluating


@dataclass(frozen=True)
class FittingConfig:
    """How latents are optimised; the defaults are those of ProHMR's evaluation.

    Attributes:
        optimiser: ``"lbfgs"`` with the strong Wolfe conditions, all images of a call as one
            problem, as in the code; or ``"adam"``.
        learning_rate: 1 for L-BFGS; 0.05 or so for Adam.
        max_iter: rounds, of at most ``round_steps`` steps each.
        round_steps: 20, PyTorch's default for L-BFGS.
        ftol: stop where a round lowers the objective by less, relative to it.
        gtol: stop where no component of the gradient is above it.
    """

    optimiser: str = "lbfgs"
    learning_rate: float = 1.0
    max_iter: int = 30
    round_steps: int = 20
    ftol: float = 1e-9
    gtol: float = 1e-9

    def __post_init__(self) -> None:
        check_choice("optimiser", self.optimiser, ("lbfgs", "adam"))


@dataclass(frozen=True)
class BodyFit:
    """Bodies that were fitted, without gradients.

    Attributes:
        z: (B, D) latents; ``(z ** 2).sum(1)`` is how unlikely the flow finds the pose.
        rotations: (B, J, 3, 3), the root's first.
        betas: (B, S).
        joints: (B, K, 3) m, of the model's body.
        translation: (B, 3) m in the camera; None where none was fitted.
        objective: at the end.
        rounds: how many there were.
    """

    z: Tensor
    rotations: Tensor
    betas: Tensor
    joints: Tensor
    translation: Tensor | None
    objective: float
    rounds: int


def fit_keypoints(
    model: BodyFlow,
    cond: Tensor,
    keypoints: Tensor,
    confidence: Tensor,
    translation: Tensor,
    focal_length: Tensor,
    camera_center: Tensor,
    image_size: Tensor,
    joints: Sequence[int] | None = None,
    betas: Tensor | None = None,
    config: FittingConfig | None = None,
    sigma: float = 100.0,
    pose_weight: float = 4.0,
    shape_weight: float = 6.0,
) -> BodyFit:
    """Fit bodies to 2D keypoints, with the flow given the image as the prior of the pose.

    From the mode z = 0 and the regressed shape, over z, shape and translation:
    :func:`fasthyp.losses.keypoint_fitting_loss`.

    Args:
        model: with a body.
        cond: (B, C), of :meth:`~fasthyp.models.flow_model.FlowModel.condition`.
        keypoints: (B, N, 2) pixels.
        confidence: (B, N). The code leaves out the hips, which detectors place elsewhere than
            SMPL does: give them 0.
        translation: (B, 3) m to start from: in the picture it is :func:`fasthyp.body.humr_camera`
            of the regressed camera, in the crop :func:`fasthyp.body.prohmr_camera`.
        focal_length, camera_center: (B, 2) pixels.
        image_size: (B, 2) pixels.
        joints: which N of the body's joints the keypoints are; all of them, in order, by default.
        betas: (B, S) to start from; the regressed ones by default.
        config: of the optimisation.
        sigma, pose_weight, shape_weight: of the objective.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    chosen = list(range(keypoints.shape[1]) if joints is None else joints)
    if len(chosen) != keypoints.shape[1]:
        raise ValueError(f"joints: expected {keypoints.shape[1]}, got {len(chosen)}")
    with _fixed(model):
        shape = model.shape_and_camera(cond)[0] if betas is None else betas
        z = _variable(cond.new_zeros(len(cond), model.dims))
        shape, translation = _variable(shape), _variable(translation)

        def objective() -> Tensor:
            prediction = model.decode(z[:, None], cond)
            points = _joints(model, prediction, shape)[:, chosen]
            return keypoint_fitting_loss(
                *(points, keypoints, confidence, translation, focal_length, camera_center),
                *(image_size, z, shape),
                sigma=sigma,
                pose_weight=pose_weight,
                shape_weight=shape_weight,
            )

        reached = _minimise(objective, [z, shape, translation], config or FittingConfig())
        return _fit(model, cond, z, shape, translation, *reached)


def refine_views(
    model: BodyFlow,
    cond: Tensor,
    config: FittingConfig | None = None,
    consistency_weight: float = 300.0,
    prior_weight: float = 1.0,
) -> BodyFit:
    """Make the poses of one person in V pictures agree, each likely given its own picture.

    From the modes, over z: :func:`fasthyp.losses.multiview_consistency_loss`, of which the root's
    rotation, another one in each camera, is no part. The shape is the mean of the regressed ones.
    No calibration is needed.

    Args:
        model: with a body.
        cond: (V, C), of one person.
        config: of the optimisation.
        consistency_weight, prior_weight: of the objective.

    Returns:
        One body for each picture.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    with _fixed(model):
        shape = model.shape_and_camera(cond)[0].mean(0, keepdim=True).expand(len(cond), -1)
        z = _variable(cond.new_zeros(len(cond), model.dims))

        def objective() -> Tensor:
            body_pose = model.decode(z[:, None], cond).rotations[:, 0, 1:]
            return multiview_consistency_loss(
                body_pose, z, consistency_weight=consistency_weight, prior_weight=prior_weight
            )

        reached = _minimise(objective, [z], config or FittingConfig())
        return _fit(model, cond, z, shape, None, *reached)


@torch.no_grad()
def interpolate(
    model: BodyFlow, cond: Tensor, start: Tensor, end: Tensor, steps: int
) -> BodyPrediction:
    """Poses on the line from one latent to another, for instance from the mode in a random
    direction (figure 5 of the paper).

    Args:
        cond: (B, C).
        start, end: (B, D).
        steps: M, both ends included; at least 2.

    Returns:
        (B, M, ...).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    for name, value in (("start", start), ("end", end)):
        if value.shape != (len(cond), model.dims):
            expected = (len(cond), model.dims)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    share = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None]
    with evaluating(model):
        return model.decode(torch.lerp(start[:, None], end[:, None], share), cond)


def _variable(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _joints(model: BodyFlow, prediction: BodyPrediction, betas: Tensor) -> Tensor:
    """(B, K, 3) of the only hypothesis, with another shape."""
    changed = BodyPrediction(**{**vars(prediction), "betas": betas})
    return model.pose(changed)[0][:, 0]


def _fit(
    model: BodyFlow,
    cond: Tensor,
    z: Tensor,
    betas: Tensor,
    translation: Tensor | None,
    objective: float,
    rounds: int,
) -> BodyFit:
    with torch.no_grad():
        prediction = model.decode(z[:, None], cond)
        joints = _joints(model, prediction, betas)
    moved = None if translation is None else translation.detach()
    rotations = prediction.rotations[:, 0]
    return BodyFit(z.detach(), rotations, betas.detach(), joints, moved, objective, rounds)


def _minimise(
    objective: Callable[[], Tensor], variables: list[Tensor], config: FittingConfig
) -> tuple[float, int]:
    """The value reached, and the number of rounds."""

    def closure() -> Tensor:
        value = objective()
        gradients = torch.autograd.grad(value, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        return value.detach()

    optimiser: torch.optim.Optimizer
    if config.optimiser == "lbfgs":
        optimiser = torch.optim.LBFGS(
            variables,
            lr=config.learning_rate,
            max_iter=config.round_steps,
            line_search_fn="strong_wolfe",
        )
        steps = 1  # each of which is a round
    else:
        optimiser = torch.optim.Adam(variables, lr=config.learning_rate)
        steps = config.round_steps
    before: float | None = None
    rounds = 0
    with torch.enable_grad():
        while rounds < config.max_iter:
            rounds += 1
            for _ in range(steps):
                value = float(optimiser.step(closure))  # type: ignore[arg-type]
            # the value is that of the round's start
            if before is not None:
                change = (before - value) / max(abs(before), abs(value), 1.0)
                if change < config.ftol and config.optimiser == "lbfgs":
                    break
            largest = max(float(v.grad.abs().max()) for v in variables if v.grad is not None)
            if largest < config.gtol:
                break
            before = value
        return float(objective().detach()), rounds


@contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients of parameters; afterwards as before."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
