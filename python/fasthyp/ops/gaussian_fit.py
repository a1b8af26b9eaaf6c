"""The op behind :func:`fasthyp.fit_gaussians`: argument checks, CPU and CUDA dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.ops._library import address, current_stream, define

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Scalars (5, ...) as amplitude, sigma_x, sigma_y, theta, rmse; mean (..., 2); covariance
(..., 2, 2); converged (...) bool; iterations (...) int32."""

MIN_CELLS = 6
"""Cells that six parameters need."""
MAX_SIDE = 1 << 15
DTYPES = (torch.float32, torch.float64)


def check_tensors(heatmaps: Tensor, init: Tensor | None) -> None:
    """TypeError or ValueError naming the argument for what no kernel may see."""
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"heatmaps: expected a torch.Tensor, got {type(heatmaps).__name__}")
    if heatmaps.dtype not in DTYPES:
        raise TypeError(f"heatmaps: expected float32 or float64, got {heatmaps.dtype}")
    if heatmaps.ndim < 2:
        raise ValueError(f"heatmaps: expected shape (..., H, W), got {tuple(heatmaps.shape)}")
    height, width = heatmaps.shape[-2:]
    if height * width < MIN_CELLS or max(height, width) > MAX_SIDE:
        raise ValueError(
            f"heatmaps: expected maps of at least {MIN_CELLS} cells and at most {MAX_SIDE} a side, "
            f"got {height} x {width}"
        )
    if init is None:
        return
    if not isinstance(init, Tensor):
        raise TypeError(f"init: expected a torch.Tensor or None, got {type(init).__name__}")
    if init.dtype not in DTYPES:
        raise TypeError(f"init: expected float32 or float64, got {init.dtype}")
    lead = tuple(heatmaps.shape[:-2])
    if tuple(init.shape) not in ((*lead, 2), (*lead, 6)):
        raise ValueError(
            f"init: expected shape {(*lead, 2)} (x, y) or {(*lead, 6)} (amplitude, x, y, sigma_x, "
            f"theta, sigma_y), got {tuple(init.shape)}"
        )
    if init.device != heatmaps.device:
        raise ValueError(
            f"init: expected on {heatmaps.device} as the heatmaps, got it on {init.device}"
        )


def allocate(heatmaps: Tensor) -> Outputs:
    lead = heatmaps.shape[:-2]
    return (
        heatmaps.new_empty((5, *lead)),
        heatmaps.new_empty((*lead, 2)),
        heatmaps.new_empty((*lead, 2, 2)),
        heatmaps.new_empty(lead, dtype=torch.bool),
        heatmaps.new_empty(lead, dtype=torch.int32),
    )


def _run(heatmaps: Tensor, init: Tensor | None, max_iter: int, tol: float) -> Outputs:
    check_tensors(heatmaps, init)
    maps = heatmaps.contiguous()
    start = None if init is None else init.to(maps.dtype).contiguous()
    outputs = scalars, mean, covariance, converged, iterations = allocate(maps)
    on_cpu = maps.device.type == "cpu"
    _C.gaussian_fit_run(
        maps.data_ptr(),
        maps.dtype == torch.float64,
        converged.numel(),
        maps.shape[-2],
        maps.shape[-1],
        address(start),
        0 if start is None else start.shape[-1],
        max_iter,
        tol,
        scalars.data_ptr(),
        mean.data_ptr(),
        covariance.data_ptr(),
        converged.data_ptr(),
        iterations.data_ptr(),
        -1 if on_cpu else maps.device.index,
        _environment.num_threads() if on_cpu else current_stream(maps.device.index),
    )
    return outputs


def _fake(heatmaps: Tensor, init: Tensor | None, max_iter: int, tol: float) -> Outputs:
    check_tensors(heatmaps, init)
    return allocate(heatmaps)


fit_gaussians = define(
    "fit_gaussians(Tensor heatmaps, Tensor? init, int max_iter, float tol) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_run,
    cuda=_run if _C.cuda_archs is not None else None,
)
