"""Programs: folding, checks, and their execution without any FrEIA."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthyp.flows import (
    MLP,
    AffineKind,
    Coupling,
    FlowExecutor,
    FlowProgram,
    Opaque,
    Permute,
    UnsupportedFlow,
)
from fasthyp.ops import coupling as ops
from fasthyp.ops._coupling_cuda import UnsupportedOnCuda


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


def linears(*widths: int) -> tuple[nn.Linear, ...]:
    return tuple(nn.Linear(a, b) for a, b in itertools.pairwise(widths))


def program() -> FlowProgram:
    torch.manual_seed(0)
    steps = [
        Permute(torch.tensor([4, 3, 2, 1, 0])),
        Coupling((0, 2), (1, 3), MLP(linears(4, 8, 4)), AffineKind(1.5, "tanh"), (0, 4)),
        Permute(torch.tensor([1, 2, 3, 4, 0])),
        Coupling((1,), (0, 2, 3, 4), MLP(linears(4, 6, 6, 2), "silu")),
    ]
    return FlowProgram(5, (3, 2), steps)


def step_by_step(program: FlowProgram, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
    """The steps as they are written, one row at a time."""
    log_jac = x.new_zeros(x.shape[0])
    for step in program.steps:
        if isinstance(step, Permute):
            x = x[:, step.index]
            continue
        h = torch.cat([x[:, list(step.passive)], cond[:, list(step.cond)]], 1)
        for i, linear in enumerate(step.subnet.linears):
            if i:
                h = torch.relu(h) if step.subnet.activation == "relu" else h * torch.sigmoid(h)
            h = linear(h)
        s, t = h.chunk(2, 1)
        f = torch.tanh(s) if step.kind.clamp_activation == "tanh" else 0.636 * torch.atan(s)
        s = step.kind.clamp * f
        x = x.clone()
        x[:, list(step.active)] = x[:, list(step.active)] * s.exp() + t
        log_jac = log_jac + s.sum(1)
    return x, log_jac


@torch.no_grad()
def test_simplified_form_equals_the_steps() -> None:
    flow = program()
    x, cond = torch.randn(6, 5), torch.randn(6, 5)
    expected, log_jac = step_by_step(flow, x, cond)
    executor = FlowExecutor(flow)
    assert executor.explain()[0]
    z, got = executor.forward(x[:, None], cond)
    torch.testing.assert_close(z[:, 0], expected)
    torch.testing.assert_close(got[:, 0], log_jac)
    back, back_jac = executor.inverse(z, cond)
    torch.testing.assert_close(back[:, 0], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back_jac, -got)
    many = x[:2].repeat(2, 3, 1)[:2]
    torch.testing.assert_close(
        executor.forward(many, cond[:2])[0][:, :1], executor.forward(many[:, :1], cond[:2])[0]
    )


@torch.no_grad()
def test_a_program_of_permutations_only() -> None:
    executor = FlowExecutor(FlowProgram(3, (), [Permute(torch.tensor([2, 0, 1]))]))
    x = torch.randn(2, 4, 3)
    z, log_jac = executor.forward(x)
    assert torch.equal(z, x[..., [2, 0, 1]])
    assert torch.equal(executor.inverse(z)[0], x)
    assert not log_jac.any()


@torch.no_grad()
def test_an_executor_notices_changes_and_copies_without_its_cache() -> None:
    flow = program()
    executor = FlowExecutor(flow)
    x, cond = torch.randn(2, 3, 5), torch.randn(2, 5)
    before = executor.forward(x, cond)[0]
    twins = [copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))]
    flow.couplings[0].subnet.linears[0].weight.add_(1.0)
    assert not torch.equal(executor.forward(x, cond)[0], before)
    for twin in twins:
        assert torch.equal(twin.forward(x, cond)[0], before)
    flow.couplings[0].subnet.linears[0].weight.sub_(1.0)
    flow.couplings[1].subnet.linears[1].bias = nn.Parameter(torch.ones(6))
    assert not torch.equal(executor.forward(x, cond)[0], before)
    changed = executor.forward(x, cond)[0]
    flow.steps[0].index.copy_(torch.tensor([0, 1, 2, 3, 4]))
    assert not torch.equal(executor.forward(x, cond)[0], changed)


@torch.no_grad()
def test_changes_through_data_need_clear() -> None:
    flow = program()
    executor = FlowExecutor(flow)
    x, cond = torch.randn(2, 3, 5), torch.randn(2, 5)
    before = executor.forward(x, cond)[0]
    flow.couplings[0].subnet.linears[0].weight.data.add_(1.0)
    executor.clear()
    assert not torch.equal(executor.forward(x, cond)[0], before)


def test_function_transforms() -> None:
    flow = program()
    for tensor in flow.tensors():
        tensor.requires_grad_(False)
    executor = FlowExecutor(flow)
    x, cond = torch.randn(2, 3, 5), torch.randn(2, 5)
    mapped = torch.func.vmap(lambda x, c: executor.forward(x[None], c[None])[0][0])(x, cond)
    torch.testing.assert_close(mapped, executor.forward(x, cond)[0])
    gradient = torch.func.grad(lambda x: executor.forward(x, cond)[0].square().sum())(x)
    x.requires_grad_()
    executor.forward(x, cond)[0].square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_wrong_programs() -> None:
    mlp = MLP(linears(3, 8, 4))
    with pytest.raises(ValueError, match="distinct dims below 5"):
        FlowProgram(5, (), [Coupling((0, 1), (1, 2, 3), mlp)])
    with pytest.raises(ValueError, match="distinct dims below 5"):
        FlowProgram(5, (), [Coupling((0, 1), (2, 3, 5), mlp)])
    with pytest.raises(ValueError, match="columns must be below 2"):
        FlowProgram(5, (2,), [Coupling((0, 1), (2, 3), mlp, cond=(2,))])
    with pytest.raises(UnsupportedFlow, match="expected 4 inputs and 4 outputs"):
        FlowProgram(5, (2,), [Coupling((0, 1), (2, 3), mlp, cond=(0, 1))])
    with pytest.raises(UnsupportedFlow, match="expected 3 inputs and 2 outputs"):
        FlowProgram(5, (), [Coupling((0,), (2, 3, 4), mlp)])
    for index in ([0, 1, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 5]):
        with pytest.raises(ValueError, match=r"expected a permutation of 0\.\.4"):
            FlowProgram(5, (), [Permute(torch.tensor(index))]).layers()


@pytest.mark.parametrize(
    ("x", "cond", "error", "message"),
    [
        (torch.randn(2, 5), torch.randn(2, 5), ValueError, r"x: expected shape \(B, M, 5\)"),
        (torch.randn(2, 3, 4), torch.randn(2, 5), ValueError, r"x: expected shape \(B, M, 5\)"),
        (torch.randn(2, 3, 5), torch.randn(3, 5), ValueError, r"cond: expected shape \(2, 5\)"),
        (torch.randn(2, 3, 5), torch.randn(2, 4), ValueError, r"cond: expected shape \(2, 5\)"),
        (torch.randn(2, 3, 5), None, ValueError, r"cond: expected shape \(2, 5\), got None"),
        (torch.randn(2, 3, 5).half(), torch.randn(2, 5), TypeError, "x: expected torch.float32"),
        (torch.randn(2, 3, 5), torch.randn(2, 5).double(), TypeError, "cond: expected"),
        ([1.0], torch.randn(2, 5), TypeError, "x: expected a tensor, got list"),
        (torch.randn(2, 3, 5), "c", TypeError, "cond: expected a tensor, got str"),
    ],
)
def test_bad_input(x: Any, cond: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FlowExecutor(program()).forward(x, cond)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision"):
        FlowExecutor(program(), "double")


@torch.no_grad()
def test_opaque_steps() -> None:
    torch.manual_seed(0)
    plain = program()
    steps = list(plain.steps)
    step = plain.couplings[0]
    module = nn.Sequential(step.subnet.linears[0], nn.ReLU(), step.subnet.linears[1])
    opaque = Opaque(module, "for the test")
    steps[1] = Coupling(step.active, step.passive, opaque, step.kind, step.cond)
    mixed = FlowExecutor(FlowProgram(5, (3, 2), steps))
    assert "1 of 2" in mixed.explain()[1]
    x, cond = torch.randn(2, 3, 5), torch.randn(2, 5)
    for name in ("forward", "inverse"):
        expected = getattr(FlowExecutor(plain), name)(x, cond)
        for a, b in zip(getattr(mixed, name)(x, cond), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_flow_that_the_kernels_refuse_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's kernels refuse one that is too wide for them; asked for once, not at each call."""
    asked = []

    def refuse(*arguments: Any) -> None:
        asked.append(arguments)
        raise UnsupportedOnCuda("too wide")

    monkeypatch.setattr(ops, "PackedFlow", refuse)
    flow = program()
    executor = FlowExecutor(flow)
    x, cond = torch.randn(4, 1, 5), torch.randn(4, 5)
    with torch.no_grad():
        for _ in range(2):
            z, log_jac = executor.forward(x, cond)
        want_z, want_log_jac = step_by_step(flow, x[:, 0], cond)
    torch.testing.assert_close(z[:, 0], want_z)
    torch.testing.assert_close(log_jac[:, 0], want_log_jac)
    assert executor.explain() == (False, "reference: too wide")
    assert len(asked) == 1
