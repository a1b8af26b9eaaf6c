"""The numbers of smplx on a full-size body, by its original file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fasthyp import body
from tests.body import make_synthetic_smpl
from tests.body.synthetic_models import python2_model
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error


def vertices_of(golden: Golden, name: str) -> Tensor:
    """Every 53rd vertex, which is what the project's own copy of the file holds."""
    key = f"{name}vertices"
    return golden[key][:, ::53] if key in golden.names else golden[f"{key}_53"]


@pytest.mark.parametrize("form", ["pickle", "python 2", "safetensors"])
@pytest.mark.parametrize("path", golden_files("smpl_full_outputs.npz"))
def test_full_size_body(path: Path, form: str, tmp_path: Path) -> None:
    golden = Golden(path)
    arrays = make_synthetic_smpl.build(golden.meta["salt"])
    for name, digest in golden.meta["sha256"].items():
        raw = np.ascontiguousarray(arrays[name]).tobytes()
        assert hashlib.sha256(raw).hexdigest() == digest, name
    file = tmp_path / "SMPL_NEUTRAL.pkl"
    if form == "python 2":
        file.write_bytes(python2_model(arrays))
    else:
        make_synthetic_smpl.write(tmp_path, golden.meta["salt"], npz=False)
    if form == "safetensors":
        body.export_safetensors(file, file.with_suffix(".safetensors"))
        file = file.with_suffix(".safetensors")
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = body.SMPL(file, dtype=dtype)
        assert model.parents.tolist() == golden["in/parents"].tolist()
        chosen = model.vertex_joint_selector.extra_joints_idxs
        assert torch.equal(chosen, golden["in/extra_joint_vertex_ids"])
        inputs = {
            name: golden[f"in/{name}"].to(dtype).requires_grad_()
            for name in ("betas", "body_pose", "global_orient", "transl")
        }
        out = model(**inputs)
        some = out.vertices[:, ::53]
        loss = (some * golden["in/W_verts_53"].to(dtype)).sum()
        loss = loss + (out.joints * golden["in/W_joints"].to(dtype)).sum()
        grads = torch.autograd.grad(loss, [*inputs.values()])
        found[dtype] = {"vertices": some, "joints": out.joints}
        found[dtype].update({f"grad {k}": g for k, g in zip(inputs, grads, strict=True)})
        with torch.no_grad():
            lean = model(**inputs, vertices=False)
        assert max_error(lean.joints, out.joints) < (1e-5 if dtype == torch.float32 else 1e-12)
    for name, value in found[torch.float64].items():
        want = _peer(golden, name, "64")
        assert max_error(value, want) <= 1e-12 * max(1.0, float(want.abs().max())), name
        peer = _peer(golden, name, "")
        assert_as_good_as(found[torch.float32][name].detach(), peer, want, name)


def _peer(golden: Golden, name: str, bits: str) -> Tensor:
    if name == "vertices":
        return vertices_of(golden, f"out{bits}/")
    if name.startswith("grad "):
        return golden[f"grad{bits}/{name[5:]}"]
    return golden[f"out{bits}/{name}"]
