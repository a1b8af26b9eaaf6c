"""What is installed here (``fasthyp info``), and whether it computes right (``fasthyp doctor``)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from typing import Any

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.reference.coupling import CouplingLayer, mlp

FAMILIES = {
    "coupling": "coupling_flow",
    "coupling_training": "coupling_pass",
    "gaussian_fit": "fit_gaussians",
    "heatmaps": "sample_heatmaps",
    "mmd": "mmd2",
    "procrustes": "procrustes",
    "skinning": "skinning",
}
"""Kernel families and an op of each."""

_REBUILD = "build again: pip install --force-reinstall --no-deps fasthyp (or . in its source)"
_WEIGHTS = "the package's data files are missing or damaged: reinstall fasthyp"


# --- info ---


def info() -> dict[str, Any]:
    """Versions, processor, CUDA, kernel families and environment, ready for JSON."""
    return {
        "versions": {
            "fasthyp": _C.version,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "FrEIA")},
            "platform": platform.platform(),
        },
        "cpu": {
            "simd": _C.simd_level(),
            "simd_levels": _C.simd_levels(),
            "threads": _environment.num_threads(),
            "cores": os.cpu_count(),
        },
        "cuda": {
            "built_for": _C.cuda_archs,
            "devices": _devices(),
            "torch_built_for": torch.version.cuda,
        },
        "families": {name: _kernels(name, op) for name, op in FAMILIES.items()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTHYP_")},
    }


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of :func:`info` as text: name, value."""
    cpu, cuda = facts["cpu"], facts["cuda"]
    yield from facts["versions"].items()
    yield "SIMD", f"{cpu['simd']} (there are {', '.join(cpu['simd_levels'])})"
    yield "threads", f"{cpu['threads']} on {cpu['cores']} cores"
    yield "CUDA kernels", f"for {cuda['built_for']}" if cuda["built_for"] else "not built"
    yield "CUDA devices", ", ".join(cuda["devices"]) or "none"
    yield "torch's CUDA", cuda["torch_built_for"] or "none"
    for name, kernels in facts["families"].items():
        yield name, ", ".join(f"{where}: {'yes' if k else 'no'}" for where, k in kernels.items())
    variables = facts["environment"].items()
    yield "environment", " ".join(f"{k}={v}" for k, v in variables) or "no FASTHYP_* set"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"device {i} (PyTorch cannot use it)" for i in range(_C.cuda_device_count())]


def _kernels(family: str, op: str) -> dict[str, bool]:
    import_module(f"fasthyp.ops.{family}")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {key.lower(): has(f"fasthyp::{op}", key) for key in ("CPU", "CUDA")}


# --- doctor ---


@dataclass(frozen=True)
class Check:
    """One finding: ``remedy`` says what to do where ``passed`` is False."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""


class _Wrong(Exception):
    """A check's finding that something is wrong; its text says what."""


def doctor() -> list[Check]:
    """Compare every op with its reference on a small input, at every SIMD level and on every
    CUDA device, and look at the installation around them."""
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("build", _check_build, _REBUILD),
        ("environment", _check_environment, "set the variable right, or unset it"),
        ("philox", _check_philox, _REBUILD),
    ]
    for level in _C.simd_levels():
        with_level = f"FASTHYP_SIMD set to a lower level than {level} avoids it; {_REBUILD}"
        ops: dict[str, Callable[[], str]] = {
            "coupling float32": partial(_check_coupling, "highest", torch.float32, 1e-4),
            "coupling float64": partial(_check_coupling, "highest", torch.float64, 1e-11),
            "coupling_training": lambda: _check_training("cpu"),
            "gaussian_fit": lambda: _check_gaussian_fit("cpu"),
            "heatmaps": lambda: _check_samples("cpu"),
            "mmd": lambda: _check_mmd("cpu"),
            "procrustes": lambda: _check_procrustes("cpu"),
            "skinning": lambda: _check_skinning("cpu"),
        }
        if level.endswith("bf16"):
            ops["coupling bfloat16"] = partial(_check_coupling, "medium", torch.float32, 0.05)
        for name, check in ops.items():
            checks.append((f"{name}, {level}", _at_level(level, check), with_level))
    checks.append(("CUDA", _check_cuda, "install a PyTorch for your driver, see pytorch.org"))
    if torch.cuda.is_available() and _C.cuda_archs:
        for i in range(torch.cuda.device_count()):
            remedy = f"rebuild with FASTHYP_CUDA_ARCHS that fit {torch.cuda.get_device_name(i)}"
            for name, on_device in (
                ("coupling float32", partial(_check_coupling, "highest", torch.float32, 1e-4)),
                ("coupling tf32", partial(_check_coupling, "high", torch.float32, 0.01)),
                ("coupling bfloat16", partial(_check_coupling, "medium", torch.float32, 0.05)),
                ("coupling_training", _check_training),
                ("gaussian_fit", _check_gaussian_fit),
                ("heatmaps", _check_samples),
                ("mmd", _check_mmd),
                ("procrustes", _check_procrustes),
                ("skinning", _check_skinning),
            ):
                checks.append((f"{name}, cuda:{i}", partial(on_device, f"cuda:{i}"), remedy))
    checks.append(("bundled model", _check_model, _WEIGHTS))
    checks.append(("bundled heatmaps", _check_heatmaps, _WEIGHTS))
    return [_run(*check) for check in checks]


def _run(name: str, check: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:  # whatever goes wrong is what the doctor is asked about
        text = str(error) if isinstance(error, _Wrong) else f"{type(error).__name__}: {error}"
        return Check(name, False, " ".join(text.split()), remedy)


def _at_level(level: str, check: Callable[[], str]) -> Callable[[], str]:
    def run() -> str:
        with _simd(level):
            return check()

    return run


@contextmanager
def _simd(level: str) -> Iterator[None]:
    before = _C.simd_level()
    _C.set_simd_level(level)
    try:
        yield
    finally:
        _C.set_simd_level(before)


def _check_build() -> str:
    installed = _version("fasthyp")
    if installed not in (_C.version, "not installed"):
        raise _Wrong(f"package {installed}, but its compiled kernels are of {_C.version}")
    return f"version {_C.version}" + ("" if installed == _C.version else ", run from its source")


def _check_environment() -> str:
    return f"backend {_environment.backend()}, {_environment.num_threads()} threads"


def _check_philox() -> str:
    from fasthyp.ops.coupling import philox_normal
    from fasthyp.reference.coupling import philox_normal as reference

    words = _C.philox4x32([0, 0, 0, 0], 0, 0)
    if list(words) != [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]:
        raise _Wrong(f"known answer missed: {' '.join(f'{word:08x}' for word in words)}")
    return _compare({"normal numbers": (philox_normal(2, 9, 7, 5), reference(2, 9, 7, 5))}, 1e-5)


def _check_coupling(
    precision: str, dtype: torch.dtype, tolerance: float, device: str = "cpu"
) -> str:
    from fasthyp.ops.coupling import PackedFlow
    from fasthyp.reference import coupling as reference

    layers, output_index, dim, cond_dim = _small_flow()
    packed = PackedFlow(layers, output_index, dim, cond_dim, precision, dtype, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 21, dim, generator=generator, dtype=torch.float64)
    cond = torch.randn(3, cond_dim, generator=generator, dtype=torch.float64)
    x, cond = x.to(dtype), cond.to(dtype)
    forward = reference.flow_forward(layers, output_index, x.double(), cond.double())
    noise = reference.philox_normal(3, 21, dim, 7).double()
    inverse = reference.flow_inverse(layers, output_index, noise, cond.double())
    there = cond.to(device)
    got_forward = packed.forward(x.to(device), there)
    got_inverse = packed.inverse(noise.to(device, dtype), there)
    _compare({"samples": (packed.sample(there, 21, 7)[0], inverse[0])}, max(tolerance, 1e-5))
    return _compare(
        {
            "forward": (got_forward[0], forward[0]),
            "forward log-Jacobian": (got_forward[1], forward[1]),
            "inverse": (got_inverse[0], inverse[0]),
            "inverse log-Jacobian": (got_inverse[1], inverse[1]),
        },
        tolerance,
    )


def _check_training(device: str) -> str:
    from fasthyp.ops.coupling_training import TrainableFlow
    from fasthyp.reference import coupling as reference

    layers, output_index, dim, cond_dim = _small_flow()
    flow = TrainableFlow(layers, output_index, dim, cond_dim, device=device)
    generator = torch.Generator().manual_seed(1)
    given = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 21, dim), (3, cond_dim))
    ]
    there = [tensor.detach().to(device, torch.float32).requires_grad_() for tensor in given]
    pairs = {}
    for name, ours, exact in (
        ("forward", flow.forward, reference.flow_forward),
        ("inverse", flow.inverse, reference.flow_inverse),
    ):
        found = [
            torch.autograd.grad(out.square().sum() + log_det.sum(), inputs)
            for (out, log_det), inputs in (
                (ours(*there), there),
                (exact(layers, output_index, *given), given),
            )
        ]
        for what, got, expected in zip(("x", "cond"), *found, strict=True):
            pairs[f"gradient of {name} by {what}"] = got, expected
    return _compare(pairs, 1e-3)


def _check_samples(device: str) -> str:
    from fasthyp.ops.heatmaps import sample_heatmaps
    from fasthyp.reference.heatmaps import sample_heatmaps as reference

    maps = torch.sin(torch.arange(2.0 * 3 * 13 * 17)).reshape(2, 3, 13, 17)
    for temperature in (1.0, 0.5):
        arguments = 40, temperature, 0.1, 0.0, 7
        ours, expected = sample_heatmaps(maps.to(device), *arguments), reference(maps, *arguments)
        if not torch.equal(ours[0].cpu(), expected[0]):
            raise _Wrong(f"other cells than the reference's at temperature {temperature}")
    return "the same cells as the reference"


def _check_gaussian_fit(device: str) -> str:
    from fasthyp.ops.gaussian_fit import fit_gaussians
    from fasthyp.reference.gaussian_fit import fit_gaussians as reference

    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    maps = torch.stack(
        [
            0.8
            * torch.exp(-((x - 7.3) ** 2 / 9 + (y - 12.6) ** 2 / 20 + (x - 7.3) * (y - 12.6) / 15)),
            torch.exp(-((x - 12.2) ** 2 + (y - 9.1) ** 2) / 5) + 0.02 * torch.sin(3 * x + 5 * y),
            torch.zeros_like(x),
        ]
    )
    fit = fit_gaussians(maps.to(device), None, 100, 1e-8)
    scalars, mean, covariance, converged, _ = (values.cpu() for values in fit)
    expected = reference(maps, None, 100, 1e-8)
    if converged.tolist() != expected[3].tolist() or converged.tolist() != [True, True, False]:
        raise _Wrong(f"converged: expected [True, True, False], got {converged.tolist()}")
    return _compare(
        {
            "amplitude and sigmas": (scalars[:3, :2], expected[0][:3, :2]),
            "mean": (mean, expected[1]),
            "covariance": (covariance, expected[2]),
        },
        1e-3,
    )


def _check_mmd(device: str) -> str:
    from fasthyp.ops.mmd import mmd2
    from fasthyp.reference.mmd import mmd2 as reference

    found = {}
    for n in (21, 330):
        x = torch.sin(torch.arange(2.0 * n * 3)).reshape(2, n, 3).double().requires_grad_()
        y = torch.cos(torch.arange(2.0 * 19 * 3)).reshape(2, 19, 3).double().requires_grad_()
        expected = reference(x, y, (0.2, 0.9), "inverse_multiquadric", False)
        exacts = expected.detach(), *torch.autograd.grad(expected.sum(), (x, y))
        there = (s.detach().float().to(device) for s in (x, y))
        settings = None, None, [0.2, 0.9], "inverse_multiquadric", "biased", True, True
        ours = mmd2(*there, *settings)
        for name, got, exact in zip(("value", "d/dx", "d/dy"), ours, exacts, strict=True):
            found[f"{name}, {n} samples"] = (got, exact)
    return _compare(found, 1e-4)


def _check_procrustes(device: str) -> str:
    from fasthyp.ops.procrustes import procrustes
    from fasthyp.reference.procrustes import procrustes as reference

    poses = torch.sin(torch.arange(5.0 * 17 * 3) ** 2).reshape(5, 17, 3).double()
    target = torch.cos(torch.arange(17.0 * 3)).reshape(17, 3).double()
    ours = procrustes(poses.to(device), target.to(device), None)
    names = "rotation", "scale", "translation"
    expected = reference(poses, target)
    return _compare(dict(zip(names, zip(ours, expected, strict=True), strict=True)), 1e-8)


def _check_skinning(device: str) -> str:
    from fasthyp.body.skinning import lbs
    from fasthyp.reference.skinning import lbs as reference

    def numbers(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(torch.arange(1.0, count + 1).double() ** 2).reshape(shape)

    joints, vertices, shapes = 4, 37, 3
    parents = [-1, 0, 1, 1]
    weights = numbers(vertices, joints).softmax(1)
    regressor = numbers(joints, vertices).softmax(1)
    v_template, shapedirs = numbers(vertices, 3), numbers(vertices, 3, shapes)
    posedirs = numbers(9 * (joints - 1), 3 * vertices)
    betas, pose = numbers(2, shapes), numbers(2, 3 * joints)
    arrays = v_template, shapedirs, posedirs, regressor, torch.tensor(parents), weights
    template, shaped, posed, joint_rows, tree, bones = (array.to(device) for array in arrays)
    ours = lbs(betas.to(device), pose.to(device), template, shaped, posed, joint_rows, tree, bones)
    pose = pose.view(2, joints, 3)
    blends = v_template, shapedirs, posedirs, regressor
    expected = reference(betas, pose, None, *blends, parents, weights, "axis_angle")
    names = "vertices", "joints"
    return _compare(dict(zip(names, zip(ours, expected, strict=True), strict=True)), 1e-9)


def _check_cuda() -> str:
    if not _C.cuda_archs:
        return "kernels built without CUDA; the CPU is used"
    if not _C.cuda_device_count():
        return f"no device; kernels are there for {_C.cuda_archs}"
    if not torch.cuda.is_available():
        raise _Wrong(f"there is a device, but PyTorch {torch.__version__} cannot use it")
    return ", ".join(_devices())


def _check_model() -> str:
    from fasthyp.models.lifting import JOINTS, LiftingFlow

    model = LiftingFlow.from_pretrained()
    generator = torch.Generator().manual_seed(0)
    mean = 64 * torch.rand(1, JOINTS, 2, generator=generator)
    with torch.no_grad():
        cond = model.condition(torch.ones(1, JOINTS), mean, torch.eye(2).expand(1, JOINTS, 2, 2))
        pose = model.sample(cond, 8, seed=0)
    if not torch.isfinite(torch.as_tensor(pose)).all():
        raise _Wrong("its hypotheses are not finite")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters"


def _check_heatmaps() -> str:
    from fasthyp.observations import read_observations

    with resources.as_file(resources.files("fasthyp.data") / "astronaut_heatmaps.npz") as path:
        observations = read_observations(path)
    return f"{len(observations)} person, {observations.size[0]} x {observations.size[1]} cells"


def _small_flow() -> tuple[list[CouplingLayer], list[int], int, int]:
    """Four float64 couplings over 7 numbers with 5 conditions, of odd widths."""
    generator = torch.Generator().manual_seed(0)
    dim, cond_dim, hidden, layers = 7, 5, 37, []
    for k in range(4):
        slots = torch.randperm(dim, generator=generator).tolist()
        active, passive = tuple(slots[: 3 + k % 2]), tuple(slots[3 + k % 2 :])
        widths = (len(passive) + cond_dim, hidden, hidden, 2 * len(active))
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        weights = tuple(
            torch.randn(s, generator=generator, dtype=torch.float64) / s[1] ** 0.5 for s in shapes
        )
        biases = tuple(0.1 * torch.randn(s[0], generator=generator).double() for s in shapes)
        cond = tuple(range(cond_dim))
        layers.append(CouplingLayer(active, passive, cond, (mlp(weights, biases),)))
    return layers, [(3 * k) % dim for k in range(dim)], dim, cond_dim


def _compare(pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> str:
    """The largest error relative to each expected tensor's largest value; _Wrong above
    ``tolerance``."""
    worst = 0.0
    for name, (got, expected) in pairs.items():
        scale = float(expected.abs().max().clamp_min(1e-6))
        error = float((got.cpu().double() - expected.double()).abs().max()) / scale
        if not error <= tolerance:
            raise _Wrong(f"{name} off by {error:.1e} of the largest, allowed {tolerance:.0e}")
        worst = max(worst, error)
    return f"error {worst:.0e}"
