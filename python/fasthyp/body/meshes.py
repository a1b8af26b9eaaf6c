"""Meshes as files, and how far hypotheses differ at each vertex."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fasthyp._files import replacing

FORMATS = ("obj", "ply", "glb")


def write_mesh(
    path: str | os.PathLike[str],
    vertices: Tensor | np.ndarray,
    faces: Tensor | np.ndarray,
    colours: np.ndarray | None = None,
) -> None:
    """Write a mesh through trimesh (``pip install "fasthyp[body]"``).

    Args:
        path: ends in ``.obj``, ``.ply`` or ``.glb``; the file appears whole or not at all.
        vertices: (V, 3) m.
        faces: (F, 3) vertices of each triangle.
        colours: (V, 3) or (V, 4) uint8, of each vertex.

    Raises:
        ImportError: trimesh is not installed.
        ValueError: another ending, or arrays of other shapes.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"path: expected a name that ends in .{', .'.join(FORMATS)}, got {path}")
    points, triangles = _plain(vertices), _plain(faces)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"vertices: expected shape (V, 3), got {points.shape}")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or triangles.dtype.kind not in "iu":
        raise ValueError(f"faces: expected whole numbers (F, 3), got {triangles.shape}")
    if triangles.size and not (triangles.min() >= 0 and triangles.max() < len(points)):
        raise ValueError(f"faces: expected vertices in 0 to {len(points) - 1}")
    if colours is not None and (
        colours.ndim != 2 or colours.shape[0] != len(points) or colours.shape[1] not in (3, 4)
    ):
        raise ValueError(f"colours: expected shape ({len(points)}, 3 or 4), got {colours.shape}")
    try:
        import trimesh
    except ImportError as error:
        raise ImportError('trimesh is missing: pip install "fasthyp[body]"') from error

    mesh = trimesh.Trimesh(points, triangles, vertex_colors=colours, process=False)
    content: Any = mesh.export(file_type=suffix)
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def vertex_spread(vertices: Tensor) -> Tensor:
    """How far the hypotheses of each vertex lie from their mean.

    Args:
        vertices: (M, V, 3) m.

    Returns:
        (V,) m, root mean square.

    Raises:
        ValueError: another shape, or no hypothesis.
    """
    if vertices.dim() != 3 or vertices.shape[2] != 3 or not len(vertices):
        raise ValueError(f"vertices: expected shape (M, V, 3), got {tuple(vertices.shape)}")
    return (vertices - vertices.mean(0)).square().sum(2).mean(0).sqrt()


def _plain(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
