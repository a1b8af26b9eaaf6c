"""The negative log-likelihood of a flow, with a fixed or an adaptive Gaussian base."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_same_shape, mean, reduce

LOG_2PI = math.log(2 * math.pi)


def negative_log_likelihood(
    z: Tensor,
    log_det: Tensor,
    base_mean: Tensor | None = None,
    base_std: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    per_dim: bool = False,
    constant: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """``-log p(x)`` of a flow that maps x to z, in nats.

    The sum over the D dimensions of ``log s + ((z - m) / s)^2 / 2 + log(2 pi) / 2``, less
    ``log|det dz/dx|``. Without a base given, m = 0 and s = 1: ProHMR (ICCV 2021), HUMR (WACV 2025).
    With one it is equation 10 of ProPose (AAAI 2025), whose base is predicted from the 2D pose.

    HUMR's code leaves out log(2 pi) and divides by D: ``per_dim=True, constant=False``; what it
    calls ``log_prob`` is this number. ProHMR's is the total with the constant, over the images with
    annotations (``valid``), and zero where there is none. ProPose's equation is written per
    dimension, with its log-determinant for the whole: the sum is meant.

    Args:
        z: (..., D), latent of each sample, float32 or float64.
        log_det: (...), log|det dz/dx| as the flow returns it.
        base_mean: (..., D), of the base distribution.
        base_std: (..., D), positive standard deviations of the base distribution.
        valid: (...), of any real or bool dtype: only for the mean, which it weights; what weighs
            nothing is not looked at.
        per_dim: divide by D.
        constant: with the D log(2 pi) / 2.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the samples.

    Returns:
        A number, or (...) for ``"none"``. The mean of no samples is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("z", z, "... D")
    shapes("log_det", log_det, "...")
    for name, value in (("base_mean", base_mean), ("base_std", base_std)):
        if value is not None:
            shapes(name, value, "... D")
            check_same_shape(name, value, "z", z)
    if valid is not None:
        shapes("valid", valid, "...", mask=True)
        if reduction != "mean":
            raise ValueError(f"reduction: expected 'mean' where valid is given, got {reduction!r}")
    for name, value in (("log_det", log_det), ("valid", valid)):
        if value is not None and value.shape != z.shape[:-1]:
            got = tuple(value.shape)
            raise ValueError(f"{name}: expected shape {tuple(z.shape[:-1])}, got {got}")
    if valid is not None:
        z = torch.where((valid == 0)[..., None], 0, z)
    dims = shapes["D"]
    if dims == 0:
        raise ValueError(f"z: expected at least one dimension, got {tuple(z.shape)}")
    z = z if base_mean is None else z - base_mean
    z = z if base_std is None else z / base_std
    values = 0.5 * (z * z).sum(-1) - log_det
    if base_std is not None:
        values = values + base_std.log().sum(-1)
    if constant:
        values = values + 0.5 * dims * LOG_2PI
    values = values / dims if per_dim else values
    return reduce(values, reduction) if valid is None else mean(values, valid)


class NegativeLogLikelihood(LossModule, function=negative_log_likelihood):
    """Module of :func:`negative_log_likelihood`."""
