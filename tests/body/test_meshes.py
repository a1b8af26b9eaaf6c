"""Mesh files and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthyp import body, viz
from tests.body import synthetic_models as synthetic

trimesh = pytest.importorskip("trimesh")


@pytest.fixture(scope="module")
def hypotheses() -> tuple[torch.Tensor, np.ndarray]:
    model = body.LinearBody(synthetic.model(vertices=90))
    pose = 0.2 * torch.randn(6, 72, generator=torch.Generator().manual_seed(0))
    return model(pose=pose).vertices, model.faces


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("suffix", ["obj", "ply", "glb"])
def test_meshes_come_back(
    suffix: str, coloured: bool, hypotheses: tuple[torch.Tensor, np.ndarray], tmp_path: Path
) -> None:
    vertices, faces = hypotheses
    colours = np.random.default_rng(0).integers(0, 255, (90, 4)).astype(np.uint8)
    colours[:, 3] = 255
    path = tmp_path / f"body.{suffix}"
    body.write_mesh(path, vertices[0], faces, colours if coloured else None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = trimesh.load(path, process=False, force="mesh")
    np.testing.assert_allclose(found.vertices, vertices[0].numpy(), atol=1e-6)
    np.testing.assert_array_equal(found.faces, faces)
    if coloured:
        np.testing.assert_allclose(found.visual.vertex_colors, colours, atol=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "body.stl"}, r"path: expected a name that ends in \.obj"),
        ({"vertices": np.zeros((3, 2))}, r"vertices: expected shape \(V, 3\)"),
        ({"faces": np.zeros((3, 4), int)}, "faces: expected whole numbers"),
        ({"faces": np.full((1, 3), 9)}, "faces: expected vertices in 0 to 2"),
        ({"colours": np.zeros((2, 3), np.uint8)}, "colours: expected shape"),
    ],
)
def test_bad_meshes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"path": "a.obj", "vertices": np.zeros((3, 3)), "faces": np.array([[0, 1, 2]])}
    arguments.update(change)
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ValueError, match=message):
        body.write_mesh(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_old_file(
    hypotheses: tuple[torch.Tensor, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "body.ply"
    path.write_bytes(b"old")

    def fail(*args: Any, **kw: Any) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr(trimesh.Trimesh, "export", fail)
    with pytest.raises(OSError, match="disk full"):
        body.write_mesh(path, hypotheses[0][0], hypotheses[1])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["body.ply"]


def test_spread_of_vertices() -> None:
    points = torch.zeros(4, 3, 3)
    points[:2, 1, 0], points[2:, 1, 0] = 0.03, -0.03
    points[0, 2] = torch.tensor([0.4, 0.0, 0.0])
    want = torch.tensor([0.0, 0.03, 0.1 * 3**0.5])
    torch.testing.assert_close(body.vertex_spread(points), want)
    with pytest.raises(ValueError, match="vertices: expected shape"):
        body.vertex_spread(points[0])


def test_figure_of_meshes(hypotheses: tuple[torch.Tensor, np.ndarray], tmp_path: Path) -> None:
    vertices, faces = hypotheses
    figure = viz.mesh_figure(vertices, faces, shown=3, up=(0, 1, 0), front=(0, 0, 1))
    assert len(figure.axes) == 1 + 1 + 3 + 1  # mean from two sides, hypotheses, colour bar
    path = tmp_path / "meshes.png"
    with path.open("wb") as file:
        viz.save_figure(figure, file)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    again = viz.mesh_figure(vertices, faces, shown=3, up=(0, 1, 0), front=(0, 0, 1))
    with path.open("wb") as file:
        viz.save_figure(again, file)
    assert path.read_bytes() == first
    for wrong, message in (
        ({"vertices": vertices[0]}, "vertices: expected shape"),
        ({"uncertainty": torch.zeros(3)}, "uncertainty: expected shape"),
        ({"shown": -1}, "shown: expected"),
        ({"front": (0, 2, 0)}, "front: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            viz.mesh_figure(**{"vertices": vertices, "faces": faces, **wrong})
