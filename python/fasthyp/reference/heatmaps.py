"""Cells drawn from heatmaps, in plain PyTorch and integers: the oracle of the kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasthyp.reference.philox import philox4x32


def weights(heatmaps: Tensor, temperature: float = 1.0, threshold: float = 0.0) -> Tensor:
    """What a cell's probability is proportional to, float64; zeros for a map to be drawn from
    uniformly.

    ``HeatmapSampler.sample`` of HUMR (Prados-Torreblanca et al., "Utilizing Uncertainty in 2D Pose
    Detectors for Probabilistic 3D Human Mesh Recovery", WACV 2025), divided by the map's maximum.
    """
    kept, highest = _kept(heatmaps, threshold)
    return (kept / highest[..., None, None]) ** temperature


def _kept(heatmaps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The values of the cells that may be drawn, zero elsewhere, and their maximum or 1."""
    least = max(float(torch.tensor(threshold, dtype=heatmaps.dtype)), np.finfo(np.float64).tiny)
    kept = torch.where(heatmaps.double() >= least, heatmaps.double(), 0.0)
    highest = kept.amax((-2, -1))
    return kept, torch.where(highest > 0, highest, 1.0)


def sample_heatmaps(
    heatmaps: Tensor,
    n: int,
    temperature: float,
    threshold: float,
    flat_value: float,
    seed: int,
    image_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Points (..., n, J, 2) as x, y and the values (..., n, J) of their cells.

    Weights are rounded to integers and added up; a number below the sum, from 64 random bits
    (``csrc/heatmaps/math.h`` says which), is looked up among the partial sums.
    """
    *lead, joints, height, width = heatmaps.shape
    cells = height * width
    maps = heatmaps.detach().cpu().reshape(-1, joints, cells)
    points = torch.empty(len(maps), n, joints, 2, dtype=heatmaps.dtype)
    values = torch.empty(len(maps), n, joints, dtype=heatmaps.dtype)
    bits = min(50, 62 - (cells - 1).bit_length())
    if temperature == 1:  # scaled by a power of two, which is exact
        kept, highest = _kept(heatmaps.detach().cpu(), threshold)
        scaled = torch.ldexp(kept, (bits + 1 - torch.frexp(highest)[1])[..., None, None])
    else:
        scaled = weights(heatmaps.detach().cpu(), temperature, threshold) * 2.0**bits
    scaled = scaled.reshape(-1, joints, cells)
    for image, joint in np.ndindex(len(maps), joints):
        cell_values = maps[image, joint]
        if not bool((cell_values < torch.inf).all()):  # also false for NaN
            points[image, :, joint] = values[image, :, joint] = torch.nan
            continue
        sums = np.cumsum(scaled[image, joint].round().to(torch.int64).numpy())
        total = int(sums[-1])
        draws = _random_bits(n, joint, image_offset + image, seed)
        below = [(total or cells) * draw >> 64 for draw in draws]
        found = torch.tensor(np.searchsorted(sums, below, side="right") if total else below)
        points[image, :, joint] = torch.stack([found % width, found // width], -1).to(points.dtype)
        values[image, :, joint] = cell_values[found] if total else flat_value
    shape = (*lead, n, joints)
    points, values = points.reshape(*shape, 2), values.reshape(shape)
    return points.to(heatmaps.device), values.to(heatmaps.device)


def _random_bits(n: int, joint: int, image: int, seed: int) -> list[int]:
    halves = np.arange((n + 1) // 2, dtype=np.uint64)
    rest = [np.full_like(halves, word) for word in (joint, image % 2**32, 1)]
    words = [word.tolist() for word in philox4x32([halves, *rest], seed)]
    pairs = zip(*words, strict=True)
    return [bits for a, b, c, d in pairs for bits in (b << 32 | a, d << 32 | c)][:n]
