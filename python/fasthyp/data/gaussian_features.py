"""What a network sees of the Gaussians fitted to a detector's heatmaps."""

from __future__ import annotations

import torch
from torch import Tensor

_GRID = 64.0
_SHIFT_AND_SCALE = ((0.85, 0.3), (0.0, 0.8), (-3.9, 1.0), (0.0, 0.24), (0.0, 0.24))
"""Of amplitudes, means, log areas and both log anisotropies: as simulated persons have them."""


def gaussian_features(
    amplitude: Tensor,
    mean: Tensor,
    covariance: Tensor,
    size: tuple[int, int] = (64, 64),
    number: int | None = None,
) -> Tensor:
    """Six numbers a joint, independent of where in the picture the person is and how large.

    Means are taken about their precision-weighted centre and divided by their precision-weighted
    spread, and so are covariances, which enter as the matrix logarithm. Values that no good fit
    has (a negative or huge amplitude, a sigma below a third of a cell or beyond a third of the
    map, an indefinite covariance, a mean far outside the map) are clipped.

    Args:
        amplitude: (B, K) peak of each fitted Gaussian (a sigmoid heatmap's is about 1).
        mean: (B, K, 2) x, y in heatmap cells.
        covariance: (B, K, 2, 2) cells^2, x right, y down.
        size: (H, W) of the heatmap.
        number: K, where only that will do.

    Returns:
        (B, 6 K): K amplitudes; x, y of K means; K log areas, K log anisotropies along x, K along
        the diagonal.

    Raises:
        TypeError: a tensor is not of floating point.
        ValueError: a wrong shape, an empty size, or, on a CPU, a NaN or infinite value (on a
            GPU, to look would be to wait).
    """
    batch = amplitude.shape[0] if amplitude.ndim else 0
    if number is None:
        number = amplitude.shape[1] if amplitude.ndim > 1 else 0
    for name, value, tail in (
        ("amplitude", amplitude, (number,)),
        ("mean", mean, (number, 2)),
        ("covariance", covariance, (number, 2, 2)),
    ):
        if value.shape != (batch, *tail):
            expected = ", ".join(("B", *map(str, tail)))
            raise ValueError(f"{name}: expected ({expected}), got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {value.dtype}")
        if value.device.type == "cpu" and not torch.isfinite(value).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: expected a positive (H, W), got {tuple(size)}")

    unit = _GRID / max(height, width)
    mean = (mean * unit).clamp(-_GRID, 2 * _GRID)
    covariance = covariance * unit**2
    a, d = covariance[..., 0, 0], covariance[..., 1, 1]
    b = (covariance[..., 0, 1] + covariance[..., 1, 0]) / 2
    middle, half = (a + d) / 2, (a - d) / 2
    radius = torch.hypot(half, b)
    lowest, highest = 0.3**2, (_GRID / 3) ** 2
    major = (middle + radius).clamp(lowest, highest)
    minor = (middle - radius).clamp(lowest, highest)

    weight = 2 / (major + minor + 1)
    weight = (weight / weight.sum(-1, keepdim=True))[..., None]
    mean = mean - (weight * mean).sum(-2, keepdim=True)
    spread = (weight * mean.square()).sum((-1, -2)).clamp_min(1.0)
    mean = mean / spread.sqrt()[:, None, None]
    log_middle = (major.log() + minor.log()) / 2 - spread.log()[:, None]
    log_half = (major.log() - minor.log()) / 2
    direction = log_half / radius.clamp_min(1e-9)
    return torch.cat(
        [
            amplitude.clamp(0, 2),
            mean.flatten(1),
            log_middle,
            direction * half,
            direction * b,
        ],
        -1,
    )


def standard_features(amplitude: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """:func:`gaussian_features` (B, 6 K) of 64 x 64 maps, each kind of number moved and scaled by
    a constant so that it is about as a standard normal one."""
    number = amplitude.shape[-1]
    features = gaussian_features(amplitude, mean, covariance)
    shift, scale = features.new_tensor(_SHIFT_AND_SCALE).T
    repeats = torch.tensor([1, 2, 1, 1, 1], device=features.device) * number
    return (features - shift.repeat_interleave(repeats)) / scale.repeat_interleave(repeats)
