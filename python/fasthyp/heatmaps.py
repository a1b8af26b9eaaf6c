"""Detector heatmaps: Gaussian fits, samples and maxima.

Coordinates are (x, y) in cells, x to the right and y down; the centre of the cell in row i and
column j is (j, i).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp._seed import check_int, resolve_seed
from fasthyp.ops import gaussian_fit as fit_ops
from fasthyp.ops import heatmaps as sample_ops
from fasthyp.reference import gaussian_fit as fit_reference
from fasthyp.reference import heatmaps as sample_reference

_HALF = (torch.float16, torch.bfloat16)


class GaussianFit(NamedTuple):
    """One Gaussian per heatmap; the shapes leave out the heatmaps' leading dimensions ``...``.

    The model is ``A exp(-(u^2 / (2 sigma_x^2) + v^2 / (2 sigma_y^2)))`` with
    ``u = cos(theta) (x - mean_x) - sin(theta) (y - mean_y)`` and
    ``v = sin(theta) (x - mean_x) + cos(theta) (y - mean_y)``.

    Attributes:
        amplitude: (...) A, in units of the heatmap.
        mean: (..., 2) x, y in cells.
        sigma_x: (...) standard deviation in cells along the principal axis nearer the x axis.
        sigma_y: (...) standard deviation in cells along the other one.
        theta: (...) in [0, pi): the first axis is (cos(theta), -sin(theta)).
        covariance: (..., 2, 2) cells squared, in image axes (x right, y down).
        rmse: (...) root mean square residual over all cells; NaN where the map is not finite.
        converged: (...) bool. False where there is nothing to fit (a constant map, NaN or infinity
            in the map or in its start), where ``max_iter`` was reached, and where the minimum is
            no blob in this map (a standard deviation beyond two map sides, a centre more than a
            side outside, less than a millionth of the sum of squares explained). All other fields
            then hold the initial guess.
        iterations: (...) int32, steps tried.
    """

    amplitude: Tensor
    mean: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    theta: Tensor
    covariance: Tensor
    rmse: Tensor
    converged: Tensor
    iterations: Tensor


def fit_gaussians(
    heatmaps: Tensor, init: Tensor | None = None, max_iter: int = 100, tol: float = 1e-8
) -> GaussianFit:
    """Fits one rotated Gaussian to each heatmap by least squares over all its cells.

    Model and default start are those of Wehrbein et al., "Probabilistic Monocular 3D Human Pose
    Estimation with Normalizing Flows", ICCV 2021 (``fit_single_gaussian`` of their code):
    amplitude = maximum, mean = its place, both standard deviations 2, angle 0. The minimum is
    the one that ``scipy.optimize.curve_fit`` finds from that start, to its tolerance.
    Levenberg-Marquardt with an analytic Jacobian in coordinates in which the current Gaussian is
    round. Computes in float64; the result does not depend on the number of threads.

    The fit has no gradient: ``heatmaps`` and ``init`` are detached.

    Args:
        heatmaps: (..., H, W) float32 or float64 on a CPU or CUDA device, usually (B, J, H, W);
            at least 6 cells a map. float16 and bfloat16 are converted to float32.
        init: starting means (..., 2) as x, y, or whole starts (..., 6) as amplitude, x, y, sigma_x,
            theta, sigma_y.
        max_iter: most steps to try.
        tol: stops when a step would lower the sum of squared residuals by less than this part.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape, device or value does not fit. One bad map is no error: it comes back
            with ``converged=False``.
    """
    if isinstance(heatmaps, Tensor) and heatmaps.dtype in _HALF:
        heatmaps = heatmaps.float()
    if isinstance(init, Tensor) and init.dtype in _HALF:
        init = init.float()
    fit_ops.check_tensors(heatmaps, init)
    _check_number("max_iter", max_iter, int, 1, 1_000_000)
    _check_number("tol", tol, float, 0.0, 1.0)
    heatmaps = heatmaps.detach()
    init = None if init is None else init.detach()
    fit = (fit_ops if _has_kernel(heatmaps) else fit_reference).fit_gaussians
    scalars, mean, covariance, converged, iterations = fit(heatmaps, init, max_iter, tol)
    amplitude, sigma_x, sigma_y, theta, rmse = scalars.unbind(0)
    return GaussianFit(
        amplitude, mean, sigma_x, sigma_y, theta, covariance, rmse, converged, iterations
    )


@overload
def sample_heatmaps(
    heatmaps: Tensor,
    n: int,
    temperature: float = ...,
    threshold: float = ...,
    seed: int | None = ...,
    *,
    generator: torch.Generator | None = ...,
    ordered: bool = ...,
    return_probabilities: Literal[False] = ...,
    image_offset: int = ...,
) -> Tensor: ...
@overload
def sample_heatmaps(
    heatmaps: Tensor,
    n: int,
    temperature: float = ...,
    threshold: float = ...,
    seed: int | None = ...,
    *,
    generator: torch.Generator | None = ...,
    ordered: bool = ...,
    return_probabilities: Literal[True],
    image_offset: int = ...,
) -> tuple[Tensor, Tensor]: ...
def sample_heatmaps(
    heatmaps: Tensor,
    n: int,
    temperature: float = 1.0,
    threshold: float = 0.0,
    seed: int | None = None,
    *,
    generator: torch.Generator | None = None,
    ordered: bool = False,
    return_probabilities: bool = False,
    image_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws n cells from each heatmap, with replacement.

    A cell's probability is proportional to its value to the power of ``temperature``, as in the
    ``HeatmapSampler`` of HUMR (WACV 2025). A map without a cell that may be drawn is drawn from
    uniformly. The numbers come from a counter-based generator: sample i of joint j of image b
    depends on the seed, b, j, i and the map alone, not on the device, n, the number of threads or
    the split into batches.

    Without gradients. On CUDA the values are not looked at beforehand, which would wait for the
    device: as on a CPU, a map that holds NaN or positive infinity gives NaN for all its samples. In
    a captured CUDA graph the seed stays what it was.

    Args:
        heatmaps: (..., J, H, W) float32 or float64 on a CPU or CUDA device. float16 and bfloat16
            are converted to float32.
        n: samples per heatmap.
        temperature: above 1 sharpens, below 1 flattens.
        threshold: cells below it are not drawn; nor are those not above zero, whatever it is.
        seed: 0 <= seed < 2**64. None draws one from ``generator`` or PyTorch's default generator,
            so that ``torch.manual_seed`` makes the result repeatable.
        generator: where a seed is drawn from.
        ordered: each joint's samples by falling probability, those of the same as drawn.
        return_probabilities: also return the value of the heatmap at each sample (the official
            ``return_probs``), 0.001 ** (1 / temperature) in maps that are drawn from uniformly.
        image_offset: number of the first image, where a batch is part of a longer list.

    Returns:
        points (..., n, J, 2) as x, y in cells, whole numbers in the heatmaps' dtype; with
        ``return_probabilities`` also (..., n, J).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(heatmaps, Tensor) and heatmaps.dtype in _HALF:
        heatmaps = heatmaps.float()
    sample_ops.check_maps(heatmaps)
    check_int("n", n, 1, 2**31)
    _check_number("temperature", temperature, float, 0.0, math.inf)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    _check_number("threshold", threshold, float, -math.inf, math.inf)
    check_int("image_offset", image_offset, 0, 2**32)
    heatmaps = heatmaps.detach()
    sample = (sample_ops if _has_kernel(heatmaps) else sample_reference).sample_heatmaps
    points, values = sample(
        *(heatmaps, n, float(temperature), float(threshold), 0.001 ** (1 / temperature)),
        *(resolve_seed(seed, generator), image_offset),
    )
    if ordered:
        values, order = values.sort(dim=-2, descending=True, stable=True)
        points = points.gather(-3, order[..., None].expand_as(points))
    return (points, values) if return_probabilities else points


def heatmap_argmax(heatmaps: Tensor) -> Tensor:
    """Where each heatmap (..., H, W) is highest, first place in row order: (..., 2) as x, y in
    cells, in the heatmaps' dtype (float32 for float16 and bfloat16).

    Raises:
        TypeError: not a tensor of a floating dtype.
        ValueError: fewer than two dimensions, or maps without cells.
    """
    if not isinstance(heatmaps, Tensor) or not heatmaps.is_floating_point():
        got = heatmaps.dtype if isinstance(heatmaps, Tensor) else type(heatmaps).__name__
        raise TypeError(f"heatmaps: expected a tensor of a floating dtype, got {got}")
    if heatmaps.ndim < 2 or 0 in heatmaps.shape[-2:]:
        raise ValueError(f"heatmaps: expected shape (..., H, W), got {tuple(heatmaps.shape)}")
    place = heatmaps.flatten(-2).argmax(-1)
    width = heatmaps.shape[-1]
    dtype = torch.float32 if heatmaps.dtype in _HALF else heatmaps.dtype
    return torch.stack([place % width, place // width], -1).to(dtype)


def heatmap_decode(heatmaps: Tensor, method: Literal["taylor", "quarter"] = "taylor") -> Tensor:
    """Where each heatmap is highest, to a fraction of a cell, without a fit.

    ``"taylor"`` takes one Newton step on the logarithm of the map from its highest cell, with
    differences of the 3 x 3 cells about it: Zhang et al., "Distribution-aware coordinate
    representation for human pose estimation" (DARK), CVPR 2020, equations 4 to 8, without their
    blur. Exact for a Gaussian of any shape whose highest cell is inside the map. There is no step
    where the cells are no peak, and none longer than one cell along an axis. ``"quarter"`` goes a
    quarter cell towards the higher neighbour along each axis, as HRNet (Sun et al., CVPR 2019) and
    many others do. Along an axis on which the highest cell is at the border, it stays.

    Args:
        heatmaps: (..., H, W), floating point. Values below 1e-10 count as that for the logarithm.
        method: ``"taylor"`` or ``"quarter"``.

    Returns:
        (..., 2) as x, y in cells, in the heatmaps' dtype (float32 for float16 and bfloat16),
        without gradients. A map that holds NaN gives whole cells, those of
        :func:`heatmap_argmax`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    whole = heatmap_argmax(heatmaps)
    if method not in ("taylor", "quarter"):
        raise ValueError(f"method: expected 'taylor' or 'quarter', got {method!r}")
    maps = heatmaps.detach()
    height, width = maps.shape[-2:]
    place = maps.flatten(-2).argmax(-1)
    x, y = place % width, place // width
    # float64: second differences of logarithms of nearly equal numbers
    flat = maps.flatten(-2).double()

    def at(right: int, down: int) -> Tensor:
        column, row = (x + right).clamp(0, width - 1), (y + down).clamp(0, height - 1)
        return flat.gather(-1, (row * width + column)[..., None])[..., 0]

    inside_x, inside_y = (x > 0) & (x < width - 1), (y > 0) & (y < height - 1)
    if method == "quarter":
        shift_x, shift_y = (
            0.25 * (at(*step) - at(-step[0], -step[1])).sign() for step in ((1, 0), (0, 1))
        )
    else:
        logs = {(i, j): at(i, j).clamp_min(1e-10).log() for i in (-1, 0, 1) for j in (-1, 0, 1)}
        centre = logs[0, 0]
        dx, dy = (logs[1, 0] - logs[-1, 0]) / 2, (logs[0, 1] - logs[0, -1]) / 2
        dxx = logs[1, 0] - 2 * centre + logs[-1, 0]
        dyy = logs[0, 1] - 2 * centre + logs[0, -1]
        dxy = (logs[1, 1] - logs[1, -1] - logs[-1, 1] + logs[-1, -1]) / 4
        # At a border the other axis is on its own.
        dxy = torch.where(inside_x & inside_y, dxy, 0.0)
        dxx, dyy = torch.where(inside_x, dxx, -1.0), torch.where(inside_y, dyy, -1.0)
        dx, dy = torch.where(inside_x, dx, 0.0), torch.where(inside_y, dy, 0.0)
        determinant = dxx * dyy - dxy * dxy
        peak = (dxx < 0) & (determinant > 0)
        determinant = torch.where(peak, determinant, 1.0)
        shift_x = torch.where(peak, (dxy * dy - dyy * dx) / determinant, 0.0).clamp(-1, 1)
        shift_y = torch.where(peak, (dxy * dx - dxx * dy) / determinant, 0.0).clamp(-1, 1)
    shift = torch.stack(
        [torch.where(inside_x, shift_x, 0.0), torch.where(inside_y, shift_y, 0.0)], -1
    )
    return whole + shift.nan_to_num(0.0, 0.0, 0.0).to(whole.dtype)


def _has_kernel(heatmaps: Tensor) -> bool:
    if _environment.backend() == "reference":
        return False
    kind = heatmaps.device.type
    return kind == "cpu" or (kind == "cuda" and _C.cuda_archs is not None)


def _check_number(name: str, value: float, kind: type, low: float, high: float) -> None:
    allowed = int if kind is int else (int, float)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
