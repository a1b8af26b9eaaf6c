"""Least-squares fits of a rotated Gaussian to heatmaps in plain PyTorch: the oracle of the kernels.

The same iteration as the kernels (``csrc/gaussian_fit/math.h`` has the derivation), written with an
explicit Jacobian over all cells of a map, batched over maps, in float64. Runs on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONGEST_STEP = 0.5  # farther from the minimum a full step throws the Gaussian off the blob
_CELLS_AT_ONCE = 1 << 20  # keeps the Jacobian near 50 MB


def fit_gaussians(
    heatmaps: Tensor, init: Tensor | None = None, max_iter: int = 100, tol: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Heatmaps (..., H, W), starts None, (..., 2) or (..., 6) -> what the op returns:

    scalars (5, ...) as amplitude, sigma_x, sigma_y, theta, rmse; mean (..., 2); covariance
    (..., 2, 2); converged (...) bool; iterations (...) int32.
    """
    lead, (height, width) = heatmaps.shape[:-2], heatmaps.shape[-2:]
    count = math.prod(lead)
    maps = heatmaps.detach().reshape(count, height, width)
    starts = None if init is None else init.detach().reshape(count, init.shape[-1])
    size = max(1, _CELLS_AT_ONCE // (height * width))
    parts = [
        _fit(
            maps[i : i + size].double(),
            None if starts is None else starts[i : i + size].double(),
            max_iter,
            tol,
        )
        for i in range(0, max(count, 1), size)
    ]
    parameters, rmse, converged, iterations = (torch.cat(part) for part in zip(*parts, strict=True))
    amplitude, x, y, sigma_x, theta, sigma_y = parameters.unbind(-1)
    theta = torch.remainder(theta, math.pi)
    # just below pi may round up to it
    theta = torch.where(theta.to(heatmaps.dtype).double() < math.pi, theta, 0.0)
    cos, sin = theta.cos(), theta.sin()
    p, q = sigma_x**2, sigma_y**2
    xx, xy, yy = p * cos**2 + q * sin**2, cos * sin * (q - p), p * sin**2 + q * cos**2
    scalars = torch.stack([amplitude, sigma_x, sigma_y, theta, rmse])
    return (
        scalars.to(heatmaps.dtype).reshape(5, *lead),
        torch.stack([x, y], -1).to(heatmaps.dtype).reshape(*lead, 2),
        torch.stack([xx, xy, xy, yy], -1).to(heatmaps.dtype).reshape(*lead, 2, 2),
        converged.reshape(lead),
        iterations.reshape(lead),
    )


def _fit(
    maps: Tensor, init: Tensor | None, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, H, W) -> parameters (N, 6) as amplitude, x, y, sigma_x, theta, sigma_y; rmse, converged,
    iterations (N,)."""
    count, height, width = maps.shape
    flat = maps.reshape(count, -1)
    initial = _initial_guess(maps, init)
    ordered = torch.isfinite(initial).all(1) & (initial[:, 3] > 0) & (initial[:, 5] > 0)
    finite = torch.isfinite(flat).all(1) & ordered
    varied = flat.amax(1) > flat.amin(1)
    square_sum = flat.square().sum(1)

    best = _from_parameters(initial)
    cost, hessian, gradient = _normal_equations(maps, best)
    initial_rmse = torch.where(finite, (cost / (height * width)).sqrt(), torch.nan)
    running = finite & varied
    converged = torch.zeros_like(running)
    iterations = torch.zeros(count, dtype=torch.int32, device=maps.device)
    damping, growth = torch.full_like(cost, 1e-3), torch.full_like(cost, 2.0)

    for _ in range(max_iter + 1):
        if not running.any():
            break
        largest = torch.diagonal(hessian, dim1=1, dim2=2).amax(1)
        add = damping * largest
        identity = torch.eye(6, dtype=maps.dtype, device=maps.device)
        step, info = torch.linalg.solve_ex(
            torch.where(running[:, None, None], hessian + add[:, None, None] * identity, identity),
            -gradient,
        )
        running &= (info == 0) & torch.isfinite(step).all(1) & (largest > 0)
        part = (_LONGEST_STEP / step.abs().amax(1)).clamp(max=1)
        slope, square = (step * gradient).sum(1), step.square().sum(1)
        step = step * part[:, None]
        predicted = part * (part * add * square - (2 - part) * slope)
        trial = _stepped(best, step, square_sum)

        iterations += running.int()
        last = running & ((predicted <= tol * cost) | (predicted <= 1e-15 * square_sum))
        best = torch.where(last[:, None], trial, best)
        converged |= last
        running &= ~last & (iterations < max_iter + 1)

        trial_cost, trial_hessian, trial_gradient = _normal_equations(maps, trial)
        better = running & (trial_cost < cost)
        gain = 1 - (2 * (cost - trial_cost) / predicted - 1) ** 3
        eased = (damping * gain.clamp(min=1 / 3)).clamp(min=1e-12)
        damping = torch.where(better, eased, damping * growth)
        growth = torch.where(better, 2.0, growth * 2)
        best = torch.where(better[:, None], trial, best)
        cost = torch.where(better, trial_cost, cost)
        hessian = torch.where(better[:, None, None], trial_hessian, hessian)
        gradient = torch.where(better[:, None], trial_gradient, gradient)
        running &= iterations < max_iter

    converged &= _plausible(best, max(height, width)) & (cost < (1 - 1e-6) * square_sum)
    rmse = (_normal_equations(maps, best)[0] / (height * width)).sqrt()
    return (
        torch.where(converged[:, None], _to_parameters(best), initial),
        torch.where(converged, rmse, initial_rmse),
        converged,
        iterations,
    )


def _initial_guess(maps: Tensor, init: Tensor | None) -> Tensor:
    """Amplitude = maximum, mean = its place, sigmas 2, theta 0, from the finite cells."""
    count, _, width = maps.shape
    flat = maps.reshape(count, -1)
    finite = torch.isfinite(flat)
    highest, place = torch.where(finite, flat, -torch.inf).max(1)
    highest = torch.where(finite.any(1), highest, 0.0)
    guess = maps.new_tensor([0.0, 0.0, 0.0, 2.0, 0.0, 2.0]).repeat(count, 1)
    guess[:, 0], guess[:, 1], guess[:, 2] = highest, place % width, place // width
    if init is not None and init.shape[1] == 2:
        guess[:, 1:3] = init
    elif init is not None:
        guess = init
    return guess


def _from_parameters(p: Tensor) -> Tensor:
    """Amplitude, x, y, sigma_x, theta, sigma_y -> amplitude, x, y, l11, l21, l22."""
    amplitude, x, y, sigma_x, theta, sigma_y = p.unbind(1)
    cos, sin, px, py = theta.cos(), theta.sin(), sigma_x**-2, sigma_y**-2
    l11 = (px * cos**2 + py * sin**2).sqrt()
    return torch.stack(
        [amplitude, x, y, l11, cos * sin * (py - px) / l11, (px * py).sqrt() / l11], 1
    )


def _covariance(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, l11, l21, l22 = g.unbind(1)
    yy, k = l22**-2, l21 / l11
    return l11**-2 + k**2 * yy, -k * yy, yy


def _to_parameters(g: Tensor) -> Tensor:
    """The inverse of :func:`_from_parameters`; sigma_x goes with the axis nearer the x axis."""
    xx, xy, yy = _covariance(g)
    half = (xx - yy) / 2
    large = (xx + yy) / 2 + torch.hypot(half, xy)
    small = 1 / (g[:, 3] * g[:, 5]) ** 2 / large
    along_x = half >= 0
    theta = torch.atan2(torch.where(along_x, -xy, xy), half.abs()) / 2
    sigma_x = torch.where(along_x, large, small).sqrt()
    sigma_y = torch.where(along_x, small, large).sqrt()
    return torch.stack([g[:, 0], g[:, 1], g[:, 2], sigma_x, theta, sigma_y], 1)


def _normal_equations(maps: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squared residuals (N,), J^T J (N, 6, 6), J^T r (N, 6)."""
    count, height, width = maps.shape
    amplitude, x, y, l11, l21, l22 = (column[:, None, None] for column in g.unbind(1))
    dx = torch.arange(width, dtype=maps.dtype, device=maps.device) - x
    dy = torch.arange(height, dtype=maps.dtype, device=maps.device)[:, None] - y
    u, v = l11 * dx + l21 * dy, (l22 * dy).expand_as(maps)
    bell = torch.exp(-(u * u + v * v) / 2)
    residual = (amplitude * bell - maps).reshape(count, -1)
    columns = [_unit(amplitude, maps) * bell, amplitude * bell * u, amplitude * bell * v]
    columns += [-amplitude * bell * u * u, -amplitude * bell * u * v, -amplitude * bell * v * v]
    jacobian = torch.stack(columns, -1).reshape(count, -1, 6)
    transposed = jacobian.transpose(1, 2)
    return (
        residual.square().sum(1),
        transposed @ jacobian,
        (transposed @ residual[:, :, None]).squeeze(2),
    )


def _unit(amplitude: Tensor, maps: Tensor) -> Tensor:
    """The unit of the amplitude's step: its own size, or the map's where it is zero."""
    norm = maps.square().sum((1, 2)).sqrt().reshape(amplitude.shape)
    return torch.where(amplitude != 0, amplitude.abs(), norm)


def _stepped(g: Tensor, step: Tensor, square_sum: Tensor) -> Tensor:
    amplitude, x, y, l11, l21, l22 = g.unbind(1)
    unit = torch.where(amplitude != 0, amplitude.abs(), square_sum.sqrt())
    dy = step[:, 2] / l22
    e1, e2 = step[:, 3].exp(), step[:, 5].exp()
    return torch.stack(
        [
            amplitude + unit * step[:, 0],
            x + (step[:, 1] - l21 * dy) / l11,
            y + dy,
            l11 * e1,
            l21 * e1 + l22 * step[:, 4],
            l22 * e2,
        ],
        1,
    )


def _plausible(g: Tensor, size: int) -> Tensor:
    """Not a constant or a slope: no larger than two maps, no further off than one map."""
    xx, _, yy = _covariance(g)
    inside = ((g[:, 1:3] > -size) & (g[:, 1:3] < 2 * size)).all(1)
    return inside & (xx + yy < 8 * size**2)
