"""Gaussian fits: the official code's results, SciPy live, the reference, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from torch import Tensor

import fasthyp
from fasthyp import _C
from fasthyp.heatmaps import GaussianFit, heatmap_argmax
from fasthyp.ops import gaussian_fit as ops
from fasthyp.reference import gaussian_fit as reference
from tests.conftest import Golden, golden_files

GROUPS = ("clean", "noisy", "elongated", "outside", "twomode")


def model(cells: tuple[np.ndarray, np.ndarray], A, x0, y0, sigma_x, theta, sigma_y) -> np.ndarray:
    """The model as the official code writes it."""
    x, y = cells
    a = np.cos(theta) ** 2 / (2 * sigma_x**2) + np.sin(theta) ** 2 / (2 * sigma_y**2)
    b = -np.sin(2 * theta) / (4 * sigma_x**2) + np.sin(2 * theta) / (4 * sigma_y**2)
    c = np.sin(theta) ** 2 / (2 * sigma_x**2) + np.cos(theta) ** 2 / (2 * sigma_y**2)
    dx, dy = x - x0, y - y0
    return A * np.exp(-(a * dx**2 + 2 * b * dx * dy + c * dy**2))


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width].astype(float)
    return x, y


def draw(parameters: np.ndarray, height: int, width: int) -> Tensor:
    """Float64 maps (N, H, W) of the model."""
    return torch.from_numpy(np.stack([model(grid(height, width), *p) for p in parameters]))


def scipy_rmse(heatmap: Tensor) -> float:
    h = heatmap.double().numpy()
    x, y = grid(*h.shape)
    place = int(h.argmax())
    start = (h.max(), place % h.shape[1], place // h.shape[1], 2.0, 0.0, 2.0)
    best, _ = curve_fit(model, (x.ravel(), y.ravel()), h.ravel(), start)
    return float(np.sqrt(((model((x, y), *best) - h) ** 2).mean()))


def random_parameters(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            rng.uniform(0.2, 1.5, count),
            rng.uniform(0.2, 0.8, count) * width,
            rng.uniform(0.2, 0.8, count) * height,
            rng.uniform(1.0, 4.0, count),
            rng.uniform(-4.0, 4.0, count),
            rng.uniform(1.0, 4.0, count),
        ],
        1,
    )


def hard_maps(count: int = 24, height: int = 48, width: int = 40) -> Tensor:
    """Two overlapping blobs and noise: no exact fit, some iterations."""
    maps = draw(random_parameters(count, height, width, 1), height, width)
    maps += 0.5 * draw(random_parameters(count, height, width, 2), height, width)
    noise = torch.from_numpy(np.random.default_rng(3).normal(0, 0.02, tuple(maps.shape)))
    return (maps + noise).float()


@pytest.fixture
def astronaut() -> Tensor:
    path = Path(fasthyp.__file__).parent / "data" / "astronaut_heatmaps.npz"
    return torch.from_numpy(np.load(path)["heatmaps"])


@pytest.fixture
def _restore_settings() -> Iterator[None]:
    level, threads = _C.simd_level(), torch.get_num_threads()
    yield
    _C.set_simd_level(level)
    torch.set_num_threads(threads)


def assert_close(fit: GaussianFit, other: GaussianFit, tolerance: float = 1e-5) -> None:
    assert torch.equal(fit.converged, other.converged)
    for name in ("amplitude", "mean", "sigma_x", "sigma_y", "covariance", "rmse"):
        ours, theirs = getattr(fit, name).double(), getattr(other, name).double()
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: n + m,
        )


def as_fit(outputs: ops.Outputs) -> GaussianFit:
    scalars, mean, covariance, converged, iterations = outputs
    amplitude, sigma_x, sigma_y, theta, rmse = scalars
    return GaussianFit(
        amplitude, mean, sigma_x, sigma_y, theta, covariance, rmse, converged, iterations
    )


def reference_fit(*arguments: object) -> GaussianFit:
    return as_fit(reference.fit_gaussians(*arguments))


# --- the official code's results ---


@pytest.mark.parametrize("path", golden_files("gaussfit_all.npz"))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("clamped", [False, True], ids=["raw", "clamped"])
def test_golden(path: Path, group: str, clamped: bool) -> None:
    golden = Golden(path)
    maps, start = golden[f"in/{group}/heatmaps"], golden[f"in/{group}/p2d"].reshape(2, -1).T
    key = "fitc" if clamped else "fit"
    expected, expected_cov = golden[f"out64/{group}/{key}"], golden[f"out64/{group}/{key}_imgcov"]
    fit = fasthyp.fit_gaussians(maps.clamp(0, 1) if clamped else maps, start)

    assert fit.converged.all()
    assert (fit.rmse.double() <= expected[:, 6] * 1.001).all()
    # MINPACK stops at relative changes of 1.5e-8 of the sum of squares, 1e-4 of the parameters.
    torch.testing.assert_close(fit.rmse.double(), expected[:, 6], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fit.amplitude.double(), expected[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(fit.mean.double(), expected[:, 1:3], rtol=0, atol=3e-4)
    scale = expected_cov[:, [0, 2]].amax(1, keepdim=True)
    covariance = fit.covariance.flatten(1)[:, [0, 1, 3]].double()
    assert ((covariance - expected_cov).abs() / scale).max() < 1e-4
    sigmas = torch.stack([fit.sigma_x, fit.sigma_y], 1).double().sort(1).values
    peer = expected[:, [3, 5]].abs().sort(1).values
    torch.testing.assert_close(sigmas, peer, rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", golden_files("gaussfit_all.npz"))
def test_golden_flat(path: Path) -> None:
    """All zero, constant, and two maps of noise: the start where there is nothing to fit."""
    golden = Golden(path)
    maps, start = golden["in/flat/heatmaps"], golden["in/flat/p2d"].reshape(2, -1).T.contiguous()
    fit = fasthyp.fit_gaussians(maps, start)
    assert not fit.converged[:2].any()
    kept = ~fit.converged
    torch.testing.assert_close(fit.mean[kept], start[kept])
    torch.testing.assert_close(fit.amplitude[kept], maps.amax((1, 2))[kept])
    assert (fit.sigma_x[kept] == 2).all()
    assert (fit.sigma_y[kept] == 2).all()
    # a bump of the noise is a minimum too
    assert (fit.rmse <= maps.square().mean((1, 2)).sqrt())[~kept].all()
    assert all(field.isfinite().all() for field in fit)


# --- SciPy live ---


def test_same_minimum_as_scipy(astronaut: Tensor) -> None:
    fit = fasthyp.fit_gaussians(astronaut)
    assert fit.converged.all()
    theirs = torch.tensor([scipy_rmse(h) for h in astronaut], dtype=torch.float64)
    torch.testing.assert_close(fit.rmse.double(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", [3.0, 6.0])
def test_starts_beside_the_blob(distance: float) -> None:
    """Where SciPy's step throws the Gaussian off, ours does not: never a higher minimum."""
    parameters = random_parameters(24, 64, 64, seed=9)
    maps = draw(parameters, 64, 64).float()
    maps += 0.003 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    angles = np.linspace(0, 6, 24)[:, None]
    away = distance * np.concatenate([np.cos(angles), np.sin(angles)], 1)
    fit = fasthyp.fit_gaussians(maps, torch.from_numpy(parameters[:, 1:3] + away))
    assert fit.converged.all()
    assert (fit.rmse < 0.0035).all()


def test_same_minimum_as_scipy_where_no_gaussian_fits() -> None:
    maps = hard_maps(12)
    fit = fasthyp.fit_gaussians(maps)
    theirs = torch.tensor([scipy_rmse(h) for h in maps], dtype=torch.float64)
    assert (fit.rmse.double() <= 1.001 * theirs).double().mean() > 0.9


# --- properties ---


@pytest.mark.parametrize("shape", [(64, 64), (64, 48), (33, 17), (9, 70), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_gaussians(shape: tuple[int, int], dtype: torch.dtype) -> None:
    parameters = random_parameters(20, *shape, seed=4)
    maps = draw(parameters, *shape).to(dtype)
    # start near: a far start may end elsewhere in maps as small as these
    init = torch.from_numpy(parameters * [0.9, 1, 1, 1.1, 1, 0.9]).to(dtype)
    fit = fasthyp.fit_gaussians(maps, init)
    expected = torch.from_numpy(parameters)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-9
    assert fit.converged.all()
    assert fit.amplitude.dtype == fit.covariance.dtype == dtype
    torch.testing.assert_close(fit.amplitude.double(), expected[:, 0], rtol=tolerance, atol=0)
    torch.testing.assert_close(fit.mean.double(), expected[:, 1:3], rtol=0, atol=10 * tolerance)
    assert fit.rmse.max() < tolerance


@settings(max_examples=60, deadline=None)
@given(
    sigma_x=st.floats(0.8, 6),
    sigma_y=st.floats(0.8, 6),
    theta=st.floats(-10, 10),
    x=st.floats(12, 52),
    y=st.floats(12, 36),
)
def test_parameters_describe_the_covariance(
    sigma_x: float, sigma_y: float, theta: float, x: float, y: float
) -> None:
    """sigmas, theta and covariance agree with each other and with the map that was drawn."""
    maps = draw(np.array([[0.8, x, y, sigma_x, theta, sigma_y]]), 48, 64)
    fit = fasthyp.fit_gaussians(maps)
    assert fit.converged.all()
    axis = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    drawn = torch.from_numpy(axis.T @ np.diag([sigma_x**2, sigma_y**2]) @ axis)
    torch.testing.assert_close(fit.covariance[0], drawn, rtol=1e-6, atol=1e-6)
    turned = float(fit.theta)
    assert 0 <= turned < math.pi
    assert min(turned, math.pi - turned) <= math.pi / 4 + 1e-9  # sigma_x is nearer the x axis
    redrawn = np.array([float(fit.amplitude), *fit.mean[0].tolist(), float(fit.sigma_x)])
    redrawn = np.append(redrawn, [turned, float(fit.sigma_y)])[None]
    torch.testing.assert_close(draw(redrawn, 48, 64), maps, rtol=0, atol=1e-7)


def test_theta_is_below_pi_in_float32() -> None:
    parameters = np.array([[1.0, 20, 20, 4, math.pi - 5e-8, 2], [1.0, 20, 20, 4, -1e-9, 2]])
    init = torch.from_numpy(parameters).float()
    theta = fasthyp.fit_gaussians(draw(parameters, 40, 40).float(), init).theta
    assert (theta >= 0).all()
    assert (theta.double() < math.pi).all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 0, 3), (0,)])
@pytest.mark.parametrize("columns", [None, 2, 6])
def test_leading_dimensions(lead: tuple[int, ...], columns: int | None) -> None:
    maps = hard_maps(10)[: max(1, math.prod(lead))][: math.prod(lead)].reshape(*lead, 48, 40)
    init = None
    if columns == 2:
        init = torch.full((*lead, 2), 20.0)
    elif columns == 6:
        init = torch.tensor([1.0, 20, 20, 3, 0.1, 3]).expand(*lead, 6)
    fit = fasthyp.fit_gaussians(maps, init)
    flat = fasthyp.fit_gaussians(
        maps.reshape(-1, 48, 40), None if init is None else init.reshape(-1, columns)
    )
    for name, tail in (("amplitude", ()), ("mean", (2,)), ("covariance", (2, 2)), ("rmse", ())):
        assert getattr(fit, name).shape == (*lead, *tail)
        assert torch.equal(getattr(fit, name).reshape(-1, *tail), getattr(flat, name))
    assert fit.converged.dtype == torch.bool
    assert fit.iterations.dtype == torch.int32


def test_start_decides() -> None:
    """From a start on the lower of two blobs, the fit is of that blob."""
    two = np.array([[1.0, 15, 20, 2, 0, 2], [0.4, 45, 20, 2, 0, 2]])
    maps = draw(two, 40, 64).sum(0, keepdim=True).float()
    torch.testing.assert_close(
        fasthyp.fit_gaussians(maps).mean, torch.tensor([[15.0, 20.0]]), atol=0.05, rtol=0
    )
    fit = fasthyp.fit_gaussians(maps, torch.tensor([[44.0, 21.0]]))
    torch.testing.assert_close(fit.mean, torch.tensor([[45.0, 20.0]]), atol=0.05, rtol=0)


def test_non_contiguous() -> None:
    maps = hard_maps(4)
    wide = torch.zeros(4, 48, 80)
    wide[..., ::2] = maps
    assert_close(fasthyp.fit_gaussians(wide[..., ::2]), fasthyp.fit_gaussians(maps), 0)
    turned = maps.transpose(1, 2)
    assert_close(fasthyp.fit_gaussians(turned), fasthyp.fit_gaussians(turned.contiguous()), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted(dtype: torch.dtype) -> None:
    maps = hard_maps(3).to(dtype)
    assert_close(fasthyp.fit_gaussians(maps), fasthyp.fit_gaussians(maps.float()), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient(dtype: torch.dtype) -> None:
    maps = hard_maps(2).to(dtype).requires_grad_()
    fit = fasthyp.fit_gaussians(maps, torch.full((2, 2), 20.0, requires_grad=True))
    assert not any(field.requires_grad for field in fit)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.fit_gaussians(maps, None, 100, 1e-8)[0].sum().backward()


# --- levels, threads, reference ---


@pytest.mark.usefixtures("_restore_settings")
def test_simd_levels_agree(astronaut: Tensor) -> None:
    fits = []
    for level in _C.simd_levels():
        _C.set_simd_level(level)
        fits.append(fasthyp.fit_gaussians(torch.cat([astronaut, astronaut.flip(1)])))
    for fit in fits[1:]:
        assert_close(fit, fits[0], 1e-6)


@pytest.mark.usefixtures("_restore_settings")
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (2, 3), (5, 13), (31, 9), (3, 65)])
def test_odd_sizes_against_the_reference(level: str, shape: tuple[int, int]) -> None:
    _C.set_simd_level(level)
    maps = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = reference_fit(maps, None, 1, 0.0)
    fit = fasthyp.fit_gaussians(maps, max_iter=1, tol=0.0)
    torch.testing.assert_close(fit.rmse, exact.rmse, rtol=1e-9, atol=1e-12)
    blobs = draw(random_parameters(7, *shape, seed=6), *shape)
    init = torch.from_numpy(random_parameters(7, *shape, seed=6) * [0.9, 1, 1, 1.1, 1, 0.9])
    exact = reference_fit(blobs, init)
    fit = fasthyp.fit_gaussians(blobs, init)
    both = exact.converged & fit.converged
    torch.testing.assert_close(fit.rmse[both], exact.rmse[both], rtol=0, atol=1e-8)


@pytest.mark.usefixtures("_restore_settings")
def test_thread_count_does_not_matter() -> None:
    maps = hard_maps(24)
    torch.set_num_threads(1)
    one = fasthyp.fit_gaussians(maps)
    for threads in (2, 3, 7, 64):
        torch.set_num_threads(threads)
        many = fasthyp.fit_gaussians(maps)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("columns", [None, 2, 6])
def test_against_the_reference(astronaut: Tensor, columns: int | None) -> None:
    init = None
    if columns == 2:
        init = heatmap_argmax(astronaut) + 1.5
    elif columns == 6:
        mean = heatmap_argmax(astronaut)
        init = torch.cat([torch.full((17, 1), 0.5), mean, torch.ones(17, 1), mean[:, :1] * 0], 1)
        init = torch.cat([init, torch.full((17, 1), 3.0)], 1)
    fit = fasthyp.fit_gaussians(astronaut, init)
    exact = reference_fit(astronaut, init)
    assert_close(fit, exact, 1e-6)
    assert (fit.iterations - exact.iterations).abs().max() <= 1


def test_backend_reference(astronaut: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fasthyp.fit_gaussians(astronaut[:4])
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    monkeypatch.setattr(ops, "fit_gaussians", None)
    assert_close(fasthyp.fit_gaussians(astronaut[:4]), fit, 1e-6)


# --- maps that cannot be fitted ---


def bad_maps() -> dict[str, Tensor]:
    blob = draw(np.array([[0.7, 8.0, 10.0, 2, 0, 2]]), 24, 20)[0].float()
    with_nan, with_inf, with_minus_inf = blob.clone(), blob.clone(), blob.clone()
    with_nan[0, 0] = with_nan[10, 9] = math.nan
    with_inf[3, 3] = math.inf
    with_minus_inf[23, 19] = -math.inf
    return {
        "zero": torch.zeros(24, 20),
        "constant": torch.full((24, 20), 0.3),
        "negative constant": torch.full((24, 20), -2.0),
        "NaN": with_nan,
        "infinity": with_inf,
        "minus infinity": with_minus_inf,
        "all NaN": torch.full((24, 20), math.nan),
        "all infinite": torch.full((24, 20), math.inf),
        "slope": torch.arange(20.0).expand(24, 20) * 0.01,
    }


@pytest.mark.parametrize("name", bad_maps())
@pytest.mark.parametrize("kind", ["kernel", "reference"])
def test_bad_map_gives_the_initial_guess(name: str, kind: str) -> None:
    good = draw(np.array([[0.7, 8.0, 10.0, 2.5, 0, 1.5]]), 24, 20)[0].float()
    bad = bad_maps()[name]
    maps = torch.stack([good, bad, good])
    fit_maps = fasthyp.fit_gaussians if kind == "kernel" else reference_fit
    fit = fit_maps(maps)
    assert fit.converged.tolist() == [True, False, True]
    torch.testing.assert_close(fit.sigma_x[[0, 2]], torch.full((2,), 2.5), rtol=1e-5, atol=0)
    usable = torch.where(bad.isfinite(), bad, -torch.inf)
    place = int(usable.argmax()) if usable.isfinite().any() else 0
    highest = float(usable.max()) if usable.isfinite().any() else 0.0
    assert fit.amplitude[1] == pytest.approx(highest)
    assert fit.mean[1].tolist() == [place % 20, place // 20]
    assert (fit.sigma_x[1], fit.sigma_y[1], fit.theta[1]) == (2, 2, 0)
    assert torch.equal(fit.covariance[1], 4 * torch.eye(2))
    assert bool(fit.rmse[1].isnan()) == (not bool(bad.isfinite().all()))


@pytest.mark.parametrize(
    "start",
    [
        (math.nan, 3),
        (3, math.inf),
        (1, 8, 10, 0, 0, 2),
        (1, 8, 10, 2, 0, -1),
        (1, 8, 10, math.nan, 0, 2),
    ],
)
def test_bad_start_of_one_map(start: tuple[float, ...]) -> None:
    good = draw(np.array([[0.7, 8.0, 10.0, 2.5, 0, 1.5]]), 24, 20).float().expand(2, -1, -1)
    fine = (8.0, 10.0) if len(start) == 2 else (1.0, 8.0, 10.0, 2.0, 0.0, 2.0)
    fit = fasthyp.fit_gaussians(good, torch.tensor([start, fine]))
    assert fit.converged.tolist() == [False, True]
    assert fit.rmse[0].isnan()
    assert fit.rmse[1] < 1e-6


def test_out_of_iterations() -> None:
    maps = hard_maps(4)
    fit = fasthyp.fit_gaussians(maps, max_iter=2)
    assert not fit.converged.any()
    assert (fit.iterations == 2).all()
    assert torch.equal(fit.mean, heatmap_argmax(maps))


@pytest.mark.parametrize("start", [(500.0, 500.0), (24.0, 10.0)])
def test_far_start_does_not_converge_to_nothing(start: tuple[float, float]) -> None:
    """The Gaussian sees none of the blob: nothing, or an amplitude of zero, is no fit."""
    good = draw(np.array([[0.7, 8.0, 10.0, 1.0, 0, 1.0]]), 24, 40)
    fit = fasthyp.fit_gaussians(good, torch.tensor([start]))
    assert not fit.converged.any()
    assert fit.mean.tolist() == [list(start)]


# --- bad arguments ---

MAPS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heatmaps": MAPS.numpy()}, TypeError, "heatmaps: expected a torch.Tensor, got ndarray"),
        ({"heatmaps": MAPS.int()}, TypeError, "heatmaps: expected float32 or float64, got .*int32"),
        ({"heatmaps": MAPS[0, 0, 0]}, ValueError, r"heatmaps: .* got \(8,\)"),
        ({"heatmaps": MAPS[..., :1, :5]}, ValueError, "at least 6 cells .* got 1 x 5"),
        ({"heatmaps": MAPS[..., :0]}, ValueError, "at least 6 cells .* got 8 x 0"),
        ({"init": [1, 2]}, TypeError, "init: expected a torch.Tensor or None, got list"),
        ({"init": torch.zeros(2, 3, 2, dtype=torch.long)}, TypeError, "init: .* got .*int64"),
        ({"init": torch.zeros(2, 3, 3)}, ValueError, r"init: expected .* got \(2, 3, 3\)"),
        ({"init": torch.zeros(3, 2)}, ValueError, r"init: expected .* got \(3, 2\)"),
        ({"init": torch.zeros(2, 3, 2, device="meta")}, ValueError, "init: .* got it on meta"),
        ({"max_iter": 0}, ValueError, "max_iter: expected 1 to 1000000, got 0"),
        ({"max_iter": 5.0}, TypeError, "max_iter: expected int, got float"),
        ({"tol": -1.0}, ValueError, "tol: expected 0.0 to 1.0, got -1.0"),
        ({"tol": math.nan}, ValueError, "tol: .* got nan"),
        ({"tol": "small"}, TypeError, "tol: expected float, got str"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fasthyp.fit_gaussians(**{"heatmaps": MAPS, **arguments})


def test_heatmap_argmax(astronaut: Tensor) -> None:
    points = heatmap_argmax(astronaut.reshape(1, 17, 64, 64))
    assert points.shape == (1, 17, 2)
    for heatmap, (x, y) in zip(astronaut, points[0].tolist(), strict=True):
        assert heatmap[int(y), int(x)] == heatmap.max()
    with pytest.raises(TypeError, match="heatmaps: expected a tensor of a floating dtype"):
        heatmap_argmax(MAPS.int())
    with pytest.raises(ValueError, match=r"heatmaps: expected shape \(..., H, W\), got \(8,\)"):
        heatmap_argmax(MAPS[0, 0, 0])


# --- the op ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [None, 2, 6])
def test_opcheck(dtype: torch.dtype, columns: int | None) -> None:
    maps = hard_maps(4).to(dtype).reshape(2, 2, 48, 40)
    init = None if columns is None else torch.ones(2, 2, columns, dtype=dtype)
    torch.library.opcheck(ops.fit_gaussians, (maps, init, 100, 1e-8))


def test_compiles() -> None:
    maps = hard_maps(3)
    compiled = torch.compile(lambda h: fasthyp.fit_gaussians(h).mean * 2, fullgraph=True)
    assert torch.equal(compiled(maps), fasthyp.fit_gaussians(maps).mean * 2)


# --- CUDA ---

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(64, 64), (33, 17), (1, 6), (96, 72), (130, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 17, 1000])
def test_cuda_matches_cpu(shape: tuple[int, int], dtype: torch.dtype, count: int) -> None:
    parameters = random_parameters(count, *shape, seed=8)
    maps = (draw(parameters, *shape) + 0.3 * draw(parameters[::-1].copy(), *shape)).to(dtype)
    init = torch.from_numpy(parameters).to(dtype)
    for start in (None, init[:, 1:3], init):
        cpu = fasthyp.fit_gaussians(maps, start)
        cuda = fasthyp.fit_gaussians(maps.cuda(), None if start is None else start.cuda())
        both = cuda.converged.cpu() & cpu.converged
        assert (cuda.converged.cpu() == cpu.converged).double().mean() > 0.98
        torch.testing.assert_close(cuda.rmse.cpu()[both], cpu.rmse[both], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", bad_maps())
def test_cuda_bad_map(name: str) -> None:
    maps = torch.stack([bad_maps()[name], hard_maps(1, 24, 20)[0]])
    cpu, cuda = fasthyp.fit_gaussians(maps), fasthyp.fit_gaussians(maps.cuda())
    assert_close(GaussianFit(*(field.cpu() for field in cuda)), cpu, 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_cuda_streams_and_graph(astronaut: Tensor) -> None:
    maps = astronaut.cuda()
    expected = fasthyp.fit_gaussians(maps)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = fasthyp.fit_gaussians(maps)
    stream.synchronize()
    assert_close(other, expected, 0)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(maps)
    with torch.cuda.graph(graph):
        captured = fasthyp.fit_gaussians(static)
    static.copy_(maps)
    graph.replay()
    assert_close(captured, expected, 0)
