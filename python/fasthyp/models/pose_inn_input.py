"""What :class:`fasthyp.models.PoseINN` sees: poses and Gaussian fits in normalised form.

Wehrbein et al., "Probabilistic Monocular 3D Human Pose Estimation with Normalizing Flows", ICCV
2021, section 4.2, and ``utils/data_utils.py`` of their code. Detector poses have the 16 joints of
MPII, of which :data:`FITTED_JOINTS` enter the condition; in the normalised frame y points up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp._tensors import check_floating
from fasthyp.data.persons import PersonBatch
from fasthyp.heatmaps import GaussianFit
from fasthyp.metrics import root_centred
from fasthyp.skeleton import H36M17_JOINTS, MPII16_JOINTS

DETECTOR_JOINTS = tuple(
    H36M17_JOINTS[j] for j in (3, 2, 1, 4, 5, 6, 0, 7, 8, 10, 16, 15, 14, 11, 12, 13)
)
"""What the detector of the paper finds: the order is MPII's, the joints are those of Human3.6M, on
which it was trained in the end (``H36M17j_TO_MPII``)."""

FITTED_JOINTS = (0, 1, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15)
"""The 13 of MPII's 16 joints that enter the condition: all but the hips and the pelvis."""

_JOINTS = 16
_UNCERTAIN = 1.05
"""Standard deviations beyond this many times that of the training heatmaps are uncertain."""


def normalise_pose_2d(
    points: Tensor, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """2D poses in the normalised frame, and covariances of their joints in the same frame.

    Each pose is centred on the mean of its joints, y is turned up, and both are divided by the
    standard deviation of all its numbers (``normalize_poses``).

    Args:
        points: (..., J, 2) x right, y down, in cells; J = 16 for the model.
        covariance: (..., J, 2, 2) in cells squared, x right, y down.

    Returns:
        Points (..., J, 2) x right, y up, without unit; covariances (..., J, 2, 2) or None. NaN
        where all joints are in one place. :meth:`PoseINN.sample` takes
        ``points.mT.flatten(-2)``: all x, then all y.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("points", points, 2)
    flip = points.new_tensor([1.0, -1.0])
    centred = (points - points.mean(-2, keepdim=True)) * flip
    scale = centred.square().mean((-2, -1), keepdim=True).sqrt()
    if covariance is not None:
        check_floating("covariance", covariance)
        if covariance.shape != (*points.shape, 2):
            raise ValueError(
                f"covariance: expected {(*points.shape, 2)}, got {tuple(covariance.shape)}"
            )
        covariance = covariance * (flip[:, None] * flip) / scale[..., None].square()
    return centred / scale, covariance


def normalise_pose_3d(poses: Tensor, metres: float = 1e-3) -> Tensor:
    """3D poses (..., J, 3), y down, z away from the camera, as the model has them: in metres,
    centred on the mean of their joints, y up, z towards the camera (``normalize_poses``).

    Args:
        poses: in any unit.
        metres: that a unit has; mm unless told.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("poses", poses, 3)
    centred = poses - poses.mean(-2, keepdim=True)
    return centred * poses.new_tensor([metres, -metres, -metres])


def camera_joints(poses: Tensor) -> Tensor:
    """The model's poses (..., 48), all x, then all y, then all z of 16 joints, as the 17 joints of
    Human3.6M (..., 17, 3): metres, camera axes (y down, z away from the camera), the root at the
    origin.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("poses", poses)
    if poses.shape[-1:] != (3 * _JOINTS,):
        raise ValueError(f"poses: expected shape (..., {3 * _JOINTS}), got {tuple(poses.shape)}")
    joints = poses.unflatten(-1, (3, _JOINTS)).mT * poses.new_tensor([1.0, -1.0, -1.0])
    return root_centred(insert_root(joints), 0)


def insert_root(poses: Tensor, hips: tuple[int, int] = (0, 3)) -> Tensor:
    """Poses (..., 16, 3) without a root as (..., 17, 3), joint 0 the mean of both hips
    (``reinsert_root_joint_torch``), any unit.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("poses", poses, 3)
    if not all(0 <= hip < poses.shape[-2] for hip in hips):
        raise ValueError(f"hips: expected joints from 0 to {poses.shape[-2] - 1}, got {hips}")
    return torch.cat([poses[..., list(hips), :].mean(-2, keepdim=True), poses], -2)


def gaussian_condition(fit: GaussianFit, heatmap_std: float = 2.0, size: int = 64) -> Tensor:
    """The condition of the model of fitted Gaussians (``preprocess_gaussian_fits``).

    Amplitudes are clipped to 0 ... 1.2, means to the map, standard deviations to 0.1 ... 5 times
    that of the training heatmaps; those above 1.05 times it are doubled, so that uncertain
    detections stand out (so the covariance of a fit of 3 cells is that of 6). Means are those of
    :func:`normalise_pose_2d`; covariances are in units of (10 ``heatmap_std``)^2 cells^2, x right,
    y up. A joint whose fit failed enters with the fit's initial guess, as in their code.

    Args:
        fit: of (B, 16, H, W) heatmaps, in cells: ``fasthyp.fit_gaussians(heatmaps)``. Its
            ``amplitude``, ``mean``, ``sigma_x``, ``sigma_y`` and ``theta`` are used; ``theta`` may
            be any angle.
        heatmap_std: of the training heatmaps in cells.
        size: side of the maps in cells.

    Returns:
        (B, 13, 6): amplitude, mean x, mean y, variance x, covariance, variance y, joints in the
        order of :data:`FITTED_JOINTS`. :meth:`PoseINN.sample` takes ``.flatten(1)``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("fit.mean", fit.mean, 2)
    shape = tuple(fit.mean.shape[:-1])
    if len(shape) != 2 or shape[1] != _JOINTS:
        raise ValueError(f"fit.mean: expected (B, {_JOINTS}, 2), got {tuple(fit.mean.shape)}")
    for name in ("amplitude", "sigma_x", "sigma_y", "theta"):
        values = check_floating(f"fit.{name}", getattr(fit, name))
        if values.shape != shape:
            raise ValueError(f"fit.{name}: expected {shape}, got {tuple(values.shape)}")
    if not heatmap_std > 0:
        raise ValueError(f"heatmap_std: expected a positive number, got {heatmap_std}")
    if size < 2:
        raise ValueError(f"size: expected at least 2, got {size}")
    axes = (fit.sigma_x, fit.sigma_y, fit.theta)
    return _condition(fit.amplitude, fit.mean, *axes, heatmap_std, size)


def person_input(
    persons: PersonBatch, heatmap_std: float = 2.0, size: int = 64
) -> tuple[Tensor, Tensor]:
    """What the model sees of persons: their Gaussians as :func:`gaussian_condition` has them, and
    their 2D pose.

    The 2D pose is that of the fitted means, clipped to the map. (The official code has the
    detector's maxima there, and the fitted means in the condition only.)

    Args:
        persons: ``amplitude``, ``mean`` and ``covariance`` of :data:`DETECTOR_JOINTS` are used; or
            of MPII's own 16, whose thorax, upper neck and top of the head stand where the spine,
            the thorax and the head of Human3.6M should.
        heatmap_std, size: as for :func:`gaussian_condition`.

    Returns:
        Gaussians (B, 78) and 2D poses (B, 32), all x, then all y.

    Raises:
        ValueError: other joints, or no Gaussians.
    """
    amplitude, mean, covariance = persons.need("amplitude", "mean", "covariance")
    if persons.detector_names not in ((), DETECTOR_JOINTS, MPII16_JOINTS):
        raise ValueError(
            f"persons: expected detector joints {DETECTOR_JOINTS}, got {persons.detector_names}"
        )
    if mean.shape[1:] != (_JOINTS, 2):
        raise ValueError(f"persons: expected mean (B, {_JOINTS}, 2), got {tuple(mean.shape)}")
    xx, xy, yy = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    middle, half, apart = (xx + yy) / 2, (xx - yy) / 2, xy
    radius = torch.hypot(half, apart)
    first, second = middle + radius, middle - radius
    # The first axis is (cos theta, -sin theta) with y down.
    theta = -0.5 * torch.atan2(apart, half)
    axes = (first.clamp_min(0).sqrt(), second.clamp_min(0).sqrt(), theta)
    gauss = _condition(amplitude, mean, *axes, heatmap_std, size)
    points, _ = normalise_pose_2d(mean.clamp(0, size - 1))
    return gauss.flatten(1), points.mT.flatten(1)


def _condition(
    amplitude: Tensor,
    mean: Tensor,
    sigma_x: Tensor,
    sigma_y: Tensor,
    theta: Tensor,
    heatmap_std: float,
    size: int,
) -> Tensor:
    points, _ = normalise_pose_2d(mean.clamp(0, size - 1))

    def eigenvalue(sigma: Tensor) -> Tensor:
        sigma = sigma.clamp(heatmap_std / 10, heatmap_std * 5)
        sigma = torch.where(sigma > _UNCERTAIN * heatmap_std, 2 * sigma, sigma)
        return (sigma / (10 * heatmap_std)).square()

    a, b = eigenvalue(sigma_x), eigenvalue(sigma_y)
    cos, sin = theta.cos(), theta.sin()
    # The first axis is (cos, -sin) in the image, y down: (cos, sin) with y up.
    columns = [
        amplitude.clamp(0, 1.2),
        *points.unbind(-1),
        a * cos * cos + b * sin * sin,
        (a - b) * cos * sin,
        a * sin * sin + b * cos * cos,
    ]
    return torch.stack(columns, -1)[:, FITTED_JOINTS]


def _check(name: str, points: Tensor, coordinates: int) -> None:
    check_floating(name, points)
    if points.ndim < 2 or points.shape[-1] != coordinates or not points.shape[-2]:
        raise ValueError(
            f"{name}: expected shape (..., J, {coordinates}), got {tuple(points.shape)}"
        )
