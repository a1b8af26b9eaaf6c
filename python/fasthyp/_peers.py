"""What fasthyp is measured against: the code that a user would run otherwise, and its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = 8
SMPL_PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]


def freia_flow(
    dim: int, cond: int, hidden: tuple[int, ...], blocks: int = BLOCKS, clamp: float = 2.0
) -> Ff.GraphINN:
    """The chain that the published models use: 8 x (GLOW coupling, permutation), clamp 2."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    torch.manual_seed(0)
    nodes: list[Any] = [Ff.InputNode(dim)]
    condition = Ff.ConditionNode(cond)
    for k in range(blocks):
        arguments = {"subnet_constructor": subnet, "clamp": clamp}
        nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, arguments, conditions=condition))
        nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": k}))
    return Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1]), condition]).eval()


def hoisted_flop(dim: int, hidden: tuple[int, ...], rows: int) -> float:
    """Of a pass of this chain, once the condition's share of first layers is computed per image."""
    half = dim // 2
    widths = [half, *hidden, 2 * half]
    return 2.0 * rows * 2 * BLOCKS * sum(a * b for a, b in pairwise(widths))


def _gaussian(cells: Any, A: float, x0: float, y0: float, sx: float, t: float, sy: float) -> Any:
    x, y = cells
    a = np.cos(t) ** 2 / (2 * sx**2) + np.sin(t) ** 2 / (2 * sy**2)
    b = -np.sin(2 * t) / (4 * sx**2) + np.sin(2 * t) / (4 * sy**2)
    c = np.sin(t) ** 2 / (2 * sx**2) + np.cos(t) ** 2 / (2 * sy**2)
    return A * np.exp(-(a * (x - x0) ** 2 + 2 * b * (x - x0) * (y - y0) + c * (y - y0) ** 2))


def scipy_fit(maps: np.ndarray) -> np.ndarray:
    """Root mean square residuals (N,) of the fits to (N, H, W); the start's where it gives up."""
    from scipy.optimize import curve_fit

    _, height, width = maps.shape
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[:height, :width])
    out = []
    for h in maps:
        place = int(h.argmax())
        best = np.array([h.max(), place % width, place // width, 2.0, 0.0, 2.0])
        with contextlib.suppress(RuntimeError):
            best, _ = curve_fit(_gaussian, (x, y), h.ravel(), best)
        out.append(np.sqrt(np.mean((_gaussian((x, y), *best) - h.ravel()) ** 2)))
    return np.array(out)


def gram_mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """The biased estimate of each problem by Gram matrices and one matrix for each kernel."""
    xx, yy, xy = x @ x.mT, y @ y.mT, x @ y.mT
    x_square, y_square = (m.diagonal(dim1=-2, dim2=-1)[..., None] for m in (xx, yy))
    distances = (
        x_square + x_square.mT - 2 * xx,
        y_square + y_square.mT - 2 * yy,
        x_square + y_square.mT - 2 * xy,
    )
    within_x, within_y, across = (
        reduce(add, (a**2 / (a**2 + distance) for a in bandwidths)) for distance in distances
    )
    return (within_x + within_y - 2 * across).mean((-2, -1))


def svd_pa_mpjpe(pred: Tensor, truth: Tensor) -> Tensor:
    """Errors (M, N) of poses (M, N, J, 3)."""
    a, b = pred - pred.mean(-2, keepdim=True), truth - truth.mean(-2, keepdim=True)
    u, s, vt = torch.linalg.svd(b.mT @ a)
    sign = torch.ones_like(s)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    rotation = (u * sign[..., None, :]) @ vt
    scale = (s * sign).sum(-1) / a.square().sum((-2, -1))
    return (scale[..., None, None] * a @ rotation.mT - b).norm(dim=-1).mean(-1)


def multinomial(maps: Tensor, n: int, temperature: float) -> Tensor:
    """The steps of HUMR's HeatmapSampler: (B, n, J, 2)."""
    images, joints, _, width = maps.shape
    weights = maps.clone()
    weights[weights < 0] = 0
    weights = weights.pow(temperature)
    weights[weights.sum((2, 3)) <= 0] = 0.001
    cells = torch.multinomial(weights.flatten(0, 1).flatten(1), n, replacement=True)
    cells = cells.reshape(images, joints, n).transpose(1, 2).float()
    return torch.stack([cells % width, torch.div(cells, width, rounding_mode="floor")], -1)


def body_arrays() -> tuple[tuple[Tensor, ...], Tensor]:
    """The arrays of ``lbs`` for a random body of SMPL's size, and a regressor of 17 joints."""
    vertices, shapes, joints, keypoints = 6890, 10, len(SMPL_PARENTS), 17
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def choice(rows: int, columns: int, count: int) -> Tensor:
        """Rows of `count` positive numbers that sum to one, zeros elsewhere."""
        chosen = torch.rand(rows, columns, generator=generator).topk(count).indices
        weights = torch.rand(rows, count, generator=generator) + 0.05
        weights /= weights.sum(1, keepdim=True)
        return torch.zeros(rows, columns).scatter_(1, chosen, weights)

    arrays = (
        0.5 * normal(vertices, 3),
        0.01 * normal(vertices, 3, shapes),
        0.005 * normal(9 * (joints - 1), 3 * vertices),
        choice(joints, vertices, 16),
        torch.tensor(SMPL_PARENTS),
        choice(vertices, joints, 4),
    )
    return arrays, choice(keypoints, vertices, 64)
