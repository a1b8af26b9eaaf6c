"""Linear blend skinning of a body model of SMPL's size: fasthyp against smplx and others.

    python benchmarks/bench_skinning.py [--json FILE] [--seconds S]

The model is synthetic, in the shape of SMPL: 6890 vertices, 24 joints, 10 shape coefficients, 207
pose features, 4 bones a vertex. `smplx` is ``smplx.lbs.lbs``; joints are 17 that a regressor of 64
vertices each takes from its vertices, or for fasthyp without them. "Samples to 2D" follows those of
a flow, 24 rotations in 6D each, to 17 joints in ProHMR's image. "Call" is that of a whole model:
smplx's SMPL, that of the package body-models where it is installed, and fasthyp's; "no mesh" asks
for the 45 joints alone, which the others take from vertices. Anny's lines are the call of its own
model and of that of ``fasthyp.body.from_anny``. Memory is what a call has at its peak beyond what
it was given and what it returns (a fresh process for each).

`read` is the time of a sum of all pose blend shapes: a call that makes the vertices of one body has
to read them too.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import interleaved, report
from torch import Tensor

from fasthyp import body, geometry
from fasthyp._peers import SMPL_PARENTS, body_arrays

VERTICES, SHAPES, JOINTS = 6890, 10, 24

Run = Callable[[], Any]


class Model:
    """The arrays of the model and the regressor."""

    def __init__(self) -> None:
        self.arrays, self.regressor = body_arrays()
        self.model = body.SkinningModel(*self.arrays)

    def bodies(self, count: int, numbers: int = 3, gradients: bool = False) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        betas, pose = torch.randn(count, SHAPES), 0.4 * torch.randn(count, JOINTS * numbers)
        return betas.requires_grad_(gradients), pose.requires_grad_(gradients)


def smplx_vertices(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    from smplx.lbs import lbs

    return lbs(betas, pose, *model.arrays)[0]


def smplx_joints(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return torch.einsum("bvc,kv->bkc", smplx_vertices(model, betas, pose), model.regressor)


def vertices(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return model.model.vertices(betas, pose)


def joints(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return model.model.joints(betas, pose, regressor=model.regressor)


CAMERA = torch.tensor([[0.9, 0.0, 0.1]])


def smplx_projected(model: Model, betas: Tensor, samples: Tensor) -> Tensor:
    from smplx.lbs import lbs

    turns = geometry.rotation_6d_to_matrix(samples.view(-1, JOINTS, 6), "columns")
    vertices = lbs(betas, turns, *model.arrays, pose2rot=False)[0]
    found = torch.einsum("bvc,kv->bkc", vertices, model.regressor)
    return body.project(found, body.prohmr_camera(CAMERA), 5000 / 224)


def projected(model: Model, betas: Tensor, samples: Tensor) -> Tensor:
    folded = model.model.fold(model.regressor)
    camera = body.Camera.prohmr(CAMERA)
    return body.project_joints(folded, betas, samples, camera, rotation="columns")[0]


def with_gradients(
    function: Callable[..., Tensor], model: Model, betas: Tensor, pose: Tensor
) -> None:
    betas.grad = pose.grad = None
    function(model, betas, pose).sum().backward()


def workloads(model: Model) -> dict[str, dict[str, Run]]:
    """What smplx and fasthyp do for each."""
    out: dict[str, dict[str, Run]] = {}
    pairs = {"vertices": (smplx_vertices, vertices), "17 joints": (smplx_joints, joints)}
    for name, (theirs, ours) in pairs.items():
        for count in (1, 1000):
            given = model.bodies(count)
            out[f"{name}, {count}"] = {
                "smplx": partial(theirs, model, *given),
                "fasthyp": partial(ours, model, *given),
            }
            given = model.bodies(count, gradients=True)
            out[f"{name}, {count}, forward + backward"] = {
                "smplx": partial(with_gradients, theirs, model, *given),
                "fasthyp": partial(with_gradients, ours, model, *given),
            }
    for count in (1, 1000):
        six = model.bodies(count, numbers=6)
        out[f"samples to 2D, {count}"] = {
            "smplx": partial(smplx_projected, model, *six),
            "fasthyp": partial(projected, model, *six),
        }
        six = model.bodies(count, numbers=6, gradients=True)
        out[f"samples to 2D, {count}, forward + backward"] = {
            "smplx": partial(with_gradients, smplx_projected, model, *six),
            "fasthyp": partial(with_gradients, projected, model, *six),
        }
    return out


def calls(model: Model) -> dict[str, dict[str, Run]]:
    """The calls of whole models."""
    from smplx import SMPL
    from smplx.utils import Struct

    template, shapes, poses, regressor, _, weights = (a.numpy() for a in model.arrays)
    arrays: dict[str, Any] = {
        "v_template": template,
        "shapedirs": shapes,
        "posedirs": np.ascontiguousarray(poses.reshape(-1, VERTICES, 3).transpose(1, 2, 0)),
        "J_regressor": regressor,
        "weights": weights,
        "kintree_table": np.array([[2**32 - 1, *SMPL_PARENTS[1:]], range(JOINTS)], np.int64),
        "f": np.arange(VERTICES // 3 * 3).reshape(-1, 3),
    }
    peer, ours = SMPL("", data_struct=Struct(**arrays)), body.SMPL(arrays)
    other: Any = None
    if find_spec("body_models"):
        from body_models.smpl.torch import SMPL as Other

        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "model.npz", **arrays)
            other = Other(model_path=Path(folder) / "model.npz")
    out: dict[str, dict[str, Run]] = {}
    for count in (1, 1000):
        betas, pose = model.bodies(count)
        given = {"betas": betas, "global_orient": pose[:, :3], "body_pose": pose[:, 3:]}
        given["transl"] = torch.zeros(count, 3)
        runs: dict[str, Run] = {"smplx": partial(peer, **given)}
        if other is not None:
            runs["body-models"] = partial(
                other.forward_vertices,
                pose[:, 3:].view(count, -1, 3),
                pelvis_rotation=pose[:, :3],
                shape=betas,
                global_translation=given["transl"],
            )
        out[f"call, {count}"] = runs | {"fasthyp": partial(ours, **given)}
        out[f"call, no mesh, {count}"] = runs | {"fasthyp": partial(ours, **given, vertices=False)}
    return out


def anny_calls() -> dict[str, dict[str, Run]]:
    if not find_spec("anny"):
        return {}
    ours = body.from_anny()
    theirs = ours._anny[0]

    def ours_call(pose: Tensor, person: dict[str, Tensor]) -> Any:
        return ours(ours.shape(**person), pose)

    out: dict[str, dict[str, Run]] = {}
    for count in (1, 100):
        pose = 0.4 * torch.randn(count, len(ours.bone_labels), 3)
        deltas = torch.eye(4).repeat(count, pose.shape[1], 1, 1)
        deltas[..., :3, :3] = geometry.axis_angle_to_matrix(pose)
        person = {"height": torch.full((count,), 0.7)}
        out[f"Anny's call, {count}"] = {
            "anny": partial(theirs, deltas, person),
            "fasthyp": partial(ours_call, pose, person),
        }
    return out


def peak_mb(contender: str, workload: str) -> float:
    command = [sys.executable, __file__, "--peak", contender, workload]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(contender: str, workload: str) -> None:
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    model = Model()
    runs = workloads(model)
    runs[workload.replace("1000", "1")][contender]()  # loads all that a first call loads
    run = runs[workload][contender]
    ctypes.CDLL(None).malloc_trim(0)  # what is free would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = resident("VmRSS")
    result = run()
    size = result.numel() * result.element_size() / 2**20 if isinstance(result, Tensor) else 0
    print((resident("VmHWM") - before) / 1024 - size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--only", default="", help="workloads with this in their name")
    parser.add_argument("--seconds", type=float, default=8.0, help="per workload")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "WORKLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    rows: list[dict[str, Any]] = []
    model = Model()
    everything = calls(model) | anny_calls() | workloads(model)
    read = {"read": model.arrays[2].sum}
    for name, contenders in everything.items():
        if options.only not in name:
            continue
        with torch.set_grad_enabled(name.endswith("backward")):
            times = interleaved(contenders | read, options.seconds, warmup=2)
        ours = times["fasthyp"]["ms"]
        row: dict[str, Any] = {"workload": name}
        row |= {f"{k}_ms": t["ms"] for k, t in times.items()}
        row |= {
            f"{k}_ratio": t["ms"] / ours
            for k, t in times.items()
            if k in contenders and k != "fasthyp"
        }
        if "1000" in name and "call" not in name:
            row |= {f"{k}_mb": peak_mb(k, name) for k in contenders}
        rows.append(row)
    report("Linear blend skinning", rows, options.json)


if __name__ == "__main__":
    main()
