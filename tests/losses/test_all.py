"""What all losses promise: gradients, the module form, errors that name the argument."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasthyp
from fasthyp import losses
from fasthyp.losses._base import LossModule
from tests.losses.cases import CASES, Case, numbers

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EACH_TENSOR = [
    pytest.param(case, name, id=f"{label}-{name}")
    for label, case in CASES.items()
    for name in case.tensors
    if isinstance(case.tensors[name], Tensor)
]
each_tensor = pytest.mark.parametrize(("case", "name"), EACH_TENSOR)


def differentiable(case: Case) -> dict[str, Tensor]:
    return {
        name: tensor.clone().requires_grad_()
        for name, tensor in case.tensors.items()
        if name not in (*case.plain, *case.masks)
    }


def test_every_function_has_a_case_and_a_module() -> None:
    covered = {case.function.__name__ for case in CASES.values()}
    others = {
        *("best_hypotheses", "best_of_m_loss_streamed", "gradient_penalty", "joint_validity"),
        *("mode_and_expectation", "normalised_residual", "off_mask", "pose_inn_positions"),
        "weighted_sum",
    }
    public = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert public == covered | others
    modules = {name for name in losses.__all__ if inspect.isclass(getattr(losses, name))}
    assert all(getattr(losses, name).__doc__ for name in public | modules)
    used = {case.module.__name__ for case in CASES.values() if case.module}
    networks = {"KCSLayer", "PoseCritic", "PosePriorDiscriminator", "JointValidity"}
    assert modules == used | networks | {"StreamedBestOfMLoss", "GradientPenalty"}


def test_reached_from_the_package() -> None:
    assert fasthyp.losses is losses
    assert "losses" in fasthyp.__all__
    assert "losses" in dir(fasthyp)


@each
def test_gradients(case: Case) -> None:
    leaves = differentiable(case)
    assert leaves

    def function(*values: Tensor) -> Tensor:
        return case(**dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@each
def test_second_gradients(case: Case) -> None:
    leaves = differentiable(case)
    value = case(**leaves).sum()
    first = torch.autograd.grad(
        value, list(leaves.values()), create_graph=True, materialize_grads=True
    )
    total = sum((g * g).sum() for g in first)
    assert torch.isfinite(total)


@each
def test_float32(case: Case) -> None:
    exact = case()
    single = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.tensors.items()
    }
    value = case.function(*single.values(), **case.options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


@each
def test_non_contiguous(case: Case) -> None:
    strided = {
        name: value.repeat_interleave(2, dim=0)[::2] if value.ndim else value
        for name, value in case.tensors.items()
        if isinstance(value, Tensor)
    }
    torch.testing.assert_close(case(**strided), case(), rtol=0, atol=1e-15)


@each
def test_finite_where_all_is_zero(case: Case) -> None:
    if not case.finite_at_zero:
        return
    leaves = {k: (0 * v).detach().requires_grad_() for k, v in differentiable(case).items()}
    value = case(**leaves)
    assert torch.isfinite(value).all()
    gradients = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    assert all(torch.isfinite(g).all() for g in gradients)


@each
def test_module(case: Case) -> None:
    if case.module is None:
        return
    module = case.module(**case.options)
    assert isinstance(module, nn.Module)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(*case.tensors.values()), case())
    for name, value in case.options.items():
        assert getattr(module, name) == value
        assert f"{name}={value!r}" in repr(module)
    with pytest.raises(TypeError, match="nonsense"):
        case.module(**case.options, nonsense=1)


@each_tensor
def test_not_a_tensor(case: Case, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected a tensor, got list"):
        case(**{name: case.tensors[name].tolist() if case.tensors[name].ndim else [1.0]})


@each_tensor
def test_wrong_dtype(case: Case, name: str) -> None:
    wrong = case.tensors[name].to(torch.complex64 if name in case.masks else torch.float16)
    with pytest.raises(TypeError, match=rf"^{name}: expected .*, got torch\."):
        case(**{name: wrong})


@each_tensor
def test_wrong_batch(case: Case, name: str) -> None:
    tensor = case.tensors[name]
    if name == next(iter(case.tensors)) or name in case.own_size:
        return
    wrong = torch.cat((tensor, tensor)) if tensor.ndim else tensor.expand(2)
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \(.*\).*, got \("):
        case(**{name: wrong})


@each_tensor
def test_wrong_number_of_dimensions(case: Case, name: str) -> None:
    if name in case.any_dims:
        return
    wrong = case.tensors[name][None, None, None]
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got "):
        case(**{name: wrong})


@each_tensor
def test_devices_are_compared(case: Case, name: str) -> None:
    if name == next(iter(case.tensors)):
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected device cpu as \w+, got meta"):
        case(**{name: case.tensors[name].to("meta")})


def call(name: str, **replaced: Any) -> Callable[[], Any]:
    case = CASES[name]
    tensors = {k: replaced.pop(k, v) for k, v in case.tensors.items()}
    options = {**case.options, **replaced}
    return lambda: case.function(*tensors.values(), **options)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (call("nll", reduction="sum"), ValueError, "reduction: expected 'mean' where valid"),
        (call("nll", z=numbers(3, 0)), ValueError, "z: expected at least one dim|base_mean"),
        (call("pose_l1", reduction="sum"), ValueError, "reduction: expected one of 'mean', 'norm'"),
        (call("joint_distance", norm=2), ValueError, "norm: expected one of 'l2', .* got 2"),
        (call("joint_distance", joints="all"), ValueError, "joints: expected one of 'sum'"),
        (call("joint_distance", reduction="sum"), ValueError, "reduction: expected one of"),
        (call("covariance", positions=numbers(2, 1, 4, 2)), ValueError, "positions: expected at l"),
        (call("covariance", metres_per_pixel=0), ValueError, "metres_per_pixel: .* above 0, got 0"),
        (call("covariance", threshold=-1), ValueError, "threshold: .* at least 0, got -1"),
        (call("covariance", threshold=float("nan")), ValueError, "threshold: .* got nan"),
        (call("covariance", threshold="2"), TypeError, "threshold: expected a number, got str"),
        (call("best_of_m", k=0), ValueError, "k: expected 1 to 5, got 0"),
        (call("best_of_m", k=6), ValueError, "k: expected 1 to 5, got 6"),
        (call("best_of_m", k=1.0), TypeError, "k: expected int, got float"),
        (call("best_of_m", chunk=0), ValueError, "chunk: expected 1 to"),
        (call("best_of_m", root=(4,)), ValueError, "root: expected joints from 0 to 3"),
        (call("best_of_m", root=()), ValueError, "root: expected joints from 0 to 3"),
        (call("best_of_m", norm="l3"), ValueError, "norm: expected one of 'l1', 'l2', got 'l3'"),
        (call("best_of_m", root=None, official=True), ValueError, "official: expected norm='l1'"),
        (call("latent_mmd", blocked=4), ValueError, "blocked: expected 0 to 3, got 4"),
        (call("latent_mmd", bandwidths=(0.0,)), ValueError, "bandwidths"),
        (
            call("latent_mmd", output=numbers(1, 4)),
            ValueError,
            "output: expected 2 samples",
        ),
        (
            call("latent_mmd", target=numbers(1, 4)),
            ValueError,
            "target: expected 2 samples",
        ),
        (
            call("latent_mmd", target=numbers(6, 5)),
            ValueError,
            r"target: .* \(P, D=4\), got",
        ),
        (
            call("heatmap_mmd", predicted=numbers(2, 1, 4, 2), estimator="unbiased"),
            *(ValueError, "predicted: expected 2 samples .*, got 1"),
        ),
        (
            call("heatmap_mmd", samples=numbers(2, 1, 4, 2), estimator="unbiased"),
            *(ValueError, "samples: expected 2 samples .*, got 1"),
        ),
        (call("heatmap_mmd", bandwidths=(0.5, 0.0)), ValueError, "bandwidths: .* got 0"),
        (call("heatmap_mmd", samples=numbers(2, 6, 4, 3)), ValueError, "samples: expected shape"),
        (call("heatmap_mmd", estimator="best"), ValueError, "estimator: expected one of 'biased'"),
        (call("heatmap_mmd", reduction="sum"), ValueError, "reduction: expected one of 'mean'"),
        (
            call("heatmap_mmd", validity=losses.JointValidity(numbers(2, 3), numbers(2, 4))),
            *(ValueError, r"validity.sampled: expected shape \(B=2, J=4\), got \(2, 3\)"),
        ),
        (call("mask", reduction="sum"), ValueError, "reduction: expected one of 'mean', 'none'"),
        (call("keypoint", norm="l3"), ValueError, "norm: expected one of 'l1', 'l2'"),
        (call("keypoint", root=(-1,)), ValueError, r"root: expected joints from 0 to 3, got \(-1,"),
        (call("parameter", predicted=numbers(3)), ValueError, r"predicted: expected shape \(B, S"),
        (call("orthonormality", pose_6d=numbers(2, 7)), ValueError, r"pose_6d: .* \(..., 6 n\), g"),
        (call("orthonormality", convention="x"), ValueError, "convention: expected one of 'column"),
        (lambda: losses.prior_loss(numbers(2, 25), 0), ValueError, "images: expected a positive"),
        (call("geman_mcclure", sigma=0.0), ValueError, "sigma: .* above 0, got 0"),
        (call("keypoint_fitting", pose_weight=-1.0), ValueError, "pose_weight: .*, got -1"),
        (call("keypoint_fitting", shape_weight=-1.0), ValueError, "shape_weight: .*, got -1"),
        (call("multiview", consistency_weight=-1.0), ValueError, "consistency_weight: .*, got -1"),
        (call("multiview", prior_weight=float("inf")), ValueError, "prior_weight: .*, got inf"),
        (call("residual_gaussian", base="cauchy"), ValueError, "base: expected one of 'gaussian'"),
        (call("pose_residual", base="cauchy"), ValueError, "base: expected one of .*'flow', got"),
        (call("residual_log_likelihood", flow_weight=-1), ValueError, "flow_weight: .*, got -1"),
        (call("energy_discriminator", margin=0), ValueError, "margin: .* above 0, got 0"),
        (call("bidirectional", threshold=1.5), ValueError, "threshold: expected 0 to 1, got 1.5"),
        (lambda: losses.weighted_sum({}, {"a": 1.0}), ValueError, "terms: expected at least one"),
        (
            lambda: losses.weighted_sum({"b": numbers(1)}, {"a": 1.0}),
            *(ValueError, r"terms: expected names of \['a'\], got 'b'"),
        ),
        (lambda: losses.mode_and_expectation(numbers(2, 0)), ValueError, "values: expected at le"),
        (lambda: losses.KCSLayer([(0, 0)]), ValueError, r"bones: expected .*, got \(0, 0\)"),
        (lambda: losses.KCSLayer([(0, 16)]), ValueError, r"bones: .* below 16, got \(0, 16\)"),
        (lambda: losses.KCSLayer()(numbers(2, 45)), ValueError, r"poses: .*48\), got \(2, 45\)"),
        (lambda: losses.gradient_penalty(1, 1, 1), TypeError, "critic: expected a function"),
        (
            lambda: losses.gradient_penalty(abs, numbers(2, 3), numbers(3, 3)),
            *(ValueError, r"fake: expected shape \(2, 3\) as real"),
        ),
        (
            lambda: losses.gradient_penalty(abs, numbers(2, 3), numbers(2, 3), numbers(3)),
            *(ValueError, r"alpha: expected shape \(2, 1\), got \(3,\)"),
        ),
        (
            lambda: losses.PosePriorDiscriminator(4)(numbers(2, 22, 3, 3), numbers(2, 10)),
            *(ValueError, r"body_pose: expected shape \(N, 23, 3, 3\), got \(2, 22, 3, 3\)"),
        ),
        (
            lambda: losses.best_of_m_loss_streamed(1, numbers(2, 3, 4), numbers(2, 4, 3)),
            *(TypeError, "generate: expected a function, got int"),
        ),
        (
            lambda: losses.best_of_m_loss_streamed(lambda z: z, numbers(2, 3, 4), numbers(2, 4, 3)),
            *(ValueError, r"generate: expected shape \(.*\), got \(2, 3, 4\)"),
        ),
        (lambda: losses.off_mask(numbers(3, 2), numbers(2, 4, 4)), ValueError, "points: .*B=2"),
    ],
)
def test_bad_input(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_module_options_are_the_keyword_only_arguments() -> None:
    def some(x: Tensor, y: Tensor | None = None, *, scale: float, shift: float = 1.0) -> Tensor:
        return scale * x + shift + (0 if y is None else y)

    class Some(LossModule, function=some):
        pass

    assert str(inspect.signature(Some)) == "(*, scale: 'float', shift: 'float' = 1.0)"
    module = Some(scale=2.0)
    one = torch.ones(())
    assert module(one) == 3
    assert module(one, one) == 4
    assert module(one, y=one) == 4
    module.shift = 0.0
    assert module(one) == 2
    with pytest.raises(TypeError, match="scale"):
        Some()


def test_weighted_sum() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(float("nan")), "c": torch.tensor(5.0)}
    weights = {"a": 3.0, "b": 0.0, "c": 0.1, "d": 7.0}
    torch.testing.assert_close(losses.weighted_sum(terms, weights), torch.tensor(6.5))


def test_presets_cannot_be_changed_and_are_the_papers() -> None:
    with pytest.raises(TypeError):
        losses.POSE_INN_WEIGHTS["mmd"] = 1.0  # type: ignore[index]
    assert dict(losses.POSE_INN_WEIGHTS) == {
        **{"l2d": 1, "generator": 1, "mmd": 10, "det": 4, "best_of_m": 4, "covariance": 750}
    }
    assert dict(losses.PROHMR_LIFTING_WEIGHTS) == {"nll": 0.001, "keypoints_3d_mode": 1}
    assert dict(losses.POCO_WEIGHTS) == {"flow": 1e-4, "base": 1e-2, "sigma": 1e-4}
    assert set(losses.PROPOSE_WEIGHTS.values()) == {1.0}
    assert losses.HUMR_WEIGHTS["nll"] == 0.1
    assert losses.POCO_CLIFF_WEIGHTS["pose"] == pytest.approx(0.6)
    defaults = inspect.signature(losses.residual_log_likelihood_loss).parameters
    assert {n: defaults[f"{n}_weight"].default for n in losses.POCO_WEIGHTS} == dict(
        losses.POCO_WEIGHTS
    )
