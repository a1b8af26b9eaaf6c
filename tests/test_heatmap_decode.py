"""Maxima of heatmaps to a fraction of a cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasthyp import heatmap_argmax, heatmap_decode


def gaussians(centres: Tensor, covariance: Tensor, height: int = 20, width: int = 30) -> Tensor:
    y, x = torch.arange(float(height))[:, None], torch.arange(float(width))
    u, v = x - centres[..., :1, None], y - centres[..., 1:, None]
    p = torch.linalg.inv(covariance)
    return torch.exp(-(p[0, 0] * u * u + 2 * p[0, 1] * u * v + p[1, 1] * v * v) / 2)


COVARIANCES = [[[4.0, 0.0], [0.0, 4.0]], [[6.0, 2.0], [2.0, 2.0]], [[0.5, -0.2], [-0.2, 3.0]]]


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_taylor_is_exact_for_a_gaussian(covariance: list[list[float]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([26.0, 16.0])
    centres = (2 + (size - 1) * torch.rand(4, 50, 2, generator=generator)).double()
    maps = gaussians(centres, torch.tensor(covariance).double()).to(dtype)
    found = heatmap_decode(maps)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), centres, rtol=0, atol=tolerance)


def test_quarter() -> None:
    maps = torch.zeros(3, 5, 6)
    maps[0, 2, 3], maps[0, 2, 2], maps[0, 3, 3] = 1, 0.5, 0.2
    maps[1, 2, 3] = 1
    maps[2, 0, 3], maps[2, 0, 4], maps[2, 1, 3] = 1, 0.5, 0.2  # at the upper border
    found = heatmap_decode(maps, "quarter")
    assert found.tolist() == [[2.75, 2.25], [3, 2], [3.25, 0]]


def test_no_peak_no_step() -> None:
    flat = torch.ones(2, 5, 6)
    assert torch.equal(heatmap_decode(flat), heatmap_argmax(flat))
    corner = gaussians(torch.tensor([-1.0, -1.0]), torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    assert heatmap_decode(corner).tolist() == [0, 0]
    edge = gaussians(torch.tensor([7.3, -1.0]), torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(heatmap_decode(edge), torch.tensor([7.3, 0.0]))
    single = torch.zeros(5, 6)
    single[2, 3] = 1
    assert heatmap_decode(single).tolist() == [3, 2]
    wild = torch.randn(200, 9, 9, generator=torch.Generator().manual_seed(0))
    step = heatmap_decode(wild) - heatmap_argmax(wild)
    assert step.abs().max() <= 1
    wild[0, 4, 4] = torch.nan
    assert torch.equal(heatmap_decode(wild)[0], heatmap_argmax(wild)[0])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"method.*'dark'"):
        heatmap_decode(torch.ones(3, 3), "dark")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="heatmaps"):
        heatmap_decode(torch.ones(3, 3).long())
    assert heatmap_decode(torch.ones(1, 1)).tolist() == [0, 0]
    assert heatmap_decode(torch.ones(2, 0, 3, 3)).shape == (2, 0, 2)
