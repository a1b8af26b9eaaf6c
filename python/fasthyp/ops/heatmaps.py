"""The op behind :func:`fasthyp.sample_heatmaps`: argument checks, CPU and CUDA dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.ops._library import current_stream, define, signed

MAX_SIDE = 1 << 15
DTYPES = (torch.float32, torch.float64)


def check_maps(heatmaps: Tensor) -> None:
    """TypeError or ValueError naming the argument for what no kernel may see."""
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"heatmaps: expected a torch.Tensor, got {type(heatmaps).__name__}")
    if heatmaps.dtype not in DTYPES:
        raise TypeError(f"heatmaps: expected float32 or float64, got {heatmaps.dtype}")
    if heatmaps.ndim < 3:
        raise ValueError(f"heatmaps: expected shape (..., J, H, W), got {tuple(heatmaps.shape)}")
    height, width = heatmaps.shape[-2:]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(
            f"heatmaps: expected maps of 1 to {MAX_SIDE} cells a side, got {height} x {width}"
        )


def _allocate(heatmaps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    shape = (*heatmaps.shape[:-3], n, heatmaps.shape[-3])
    return heatmaps.new_empty((*shape, 2)), heatmaps.new_empty(shape)


def _run(
    heatmaps: Tensor,
    n: int,
    temperature: float,
    threshold: float,
    flat_value: float,
    seed: int,
    image_offset: int,
) -> tuple[Tensor, Tensor]:
    check_maps(heatmaps)
    maps = heatmaps.contiguous()
    points, values = _allocate(maps, n)
    joints, height, width = maps.shape[-3:]
    on_cpu = maps.device.type == "cpu"
    _C.heatmaps_sample(
        *(maps.data_ptr(), maps.dtype == torch.float64),
        *(maps.shape[:-3].numel(), joints, height, width, n),
        *(threshold, temperature, flat_value),
        *(seed % 2**64, image_offset, points.data_ptr(), values.data_ptr()),
        -1 if on_cpu else maps.device.index,
        _environment.num_threads() if on_cpu else current_stream(maps.device.index),
    )
    return points, values


def _fake(heatmaps: Tensor, n: int, *_: float) -> tuple[Tensor, Tensor]:
    check_maps(heatmaps)
    return _allocate(heatmaps, n)


_op = define(
    "sample_heatmaps(Tensor heatmaps, int n, float temperature, float threshold, float flat_value,"
    " int seed, int image_offset) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_run,
    cuda=_run if _C.cuda_archs is not None else None,
)


def sample_heatmaps(
    heatmaps: Tensor,
    n: int,
    temperature: float,
    threshold: float,
    flat_value: float,
    seed: int,
    image_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Points (..., n, J, 2) as x, y and the values (..., n, J) of their cells."""
    return _op(heatmaps, n, temperature, threshold, flat_value, signed(seed), image_offset)
