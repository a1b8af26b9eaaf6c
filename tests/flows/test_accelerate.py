"""accelerate, restore and explain on whole models."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import Tensor, nn

import fasthyp.flows as flows
from tests.conftest import max_error, random_flow


class Model(nn.Module):
    """A flow somewhere inside a model, as in the published code."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"pose": random_flow(9, (4,))})
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.register_buffer("scale", torch.tensor(2.0))
        self.view = self.backbone[0].weight * 2.0  # a tensor that deepcopy would refuse
        self.eval()

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.heads["pose"](x, self.backbone(image))[0] * self.scale


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


@pytest.fixture
def model() -> Model:
    return Model()


def test_a_copy_shares_every_parameter_and_buffer(model: Model) -> None:
    fast: Any = flows.accelerate(model)
    assert type(fast) is Model
    assert fast is not model
    assert fast.heads["pose"] is not model.heads["pose"]
    mine, theirs = dict(fast.named_parameters()), dict(model.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert all(a is b for a, b in zip(fast.buffers(), model.buffers(), strict=True))
    assert list(fast.state_dict()) == list(model.state_dict())
    assert type(model.heads["pose"]) is ff.GraphINN
    assert isinstance(fast.heads["pose"], ff.GraphINN)
    x, image = torch.randn(5, 9), torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, image), model(x, image), rtol=1e-4, atol=1e-4)
        model.heads["pose"].module_list[0].subnet1[0].weight.add_(1.0)
        torch.testing.assert_close(fast(x, image), model(x, image), rtol=1e-4, atol=1e-4)


def test_restore_returns_what_was_passed_in(model: Model) -> None:
    assert flows.restore(flows.accelerate(model)) is model
    assert flows.restore(model) is model
    twice = flows.accelerate(flows.accelerate(model))
    assert flows.restore(flows.restore(twice)) is model


def test_in_place(model: Model) -> None:
    flow = model.heads["pose"]
    attributes = set(flow.__dict__)
    assert flows.accelerate(model, inplace=True) is model
    assert type(flow) is flows.GraphINN
    assert type(flow.module_list[0]) is flows.GLOWCouplingBlock
    assert type(flow.node_list[0]) is flows.InputNode
    with torch.no_grad():
        flow(torch.randn(2, 9), torch.randn(2, 4))
    assert flows.restore(model) is model
    assert type(flow) is ff.GraphINN
    assert type(flow.module_list[0]) is fm.GLOWCouplingBlock
    assert type(flow.node_list[0]) is ff.InputNode
    assert type(flow.node_list[1]) is ff.Node
    assert set(flow.__dict__) == attributes


def test_the_precision_may_be_changed_in_place(model: Model) -> None:
    flows.accelerate(model, inplace=True)
    assert "highest" in str(flows.explain(model))
    flows.accelerate(model, inplace=True, precision="medium")
    assert "medium" in str(flows.explain(model))
    assert type(flows.restore(model).heads["pose"]) is ff.GraphINN


def test_copies_of_an_accelerated_model_can_be_restored(model: Model) -> None:
    del model.view
    for twin in (copy.deepcopy(flows.accelerate(model)), _pickled(flows.accelerate(model))):
        restored = flows.restore(twin)
        assert restored is twin
        assert type(restored.heads["pose"]) is ff.GraphINN


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


class OwnsItsOptimizer(nn.Module):
    """As the ICCV 2021 code: optimizer, scheduler and a parameter list are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inn = random_flow(9, (4,), graph="ReversibleGraphNet")
        self.cond_net = nn.Linear(3, 4)
        self.trainable = [p for p in self.inn.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trainable, lr=0.01)
        self.optimizer.add_param_group({"params": self.cond_net.parameters()})
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 150, 0.5)

    def forward(self, x: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
        return self.inn(x, self.cond_net(gauss))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
def test_a_model_that_owns_its_optimizer() -> None:
    model = OwnsItsOptimizer()
    fast: Any = flows.accelerate(model)
    x, gauss = torch.randn(5, 9), torch.randn(5, 3)
    with torch.no_grad():
        before = fast(x, gauss)[0]
    z, log_jac = fast(x, gauss)
    (0.5 * z.square().sum() - log_jac.sum()).backward()
    fast.optimizer.step()
    fast.lr_scheduler.step()
    with torch.no_grad():
        after = fast(x, gauss)[0]
        torch.testing.assert_close(after, model(x, gauss)[0], rtol=1e-4, atol=1e-4)
    assert max_error(after, before) > 1e-3


def test_own_classes_stay_what_they_are() -> None:
    net = random_flow(6, framework=flows, modules=flows)
    assert flows.restore(flows.accelerate(net)) is net
    assert type(flows.restore(flows.accelerate(net, inplace=True))) is flows.GraphINN


def test_explain(model: Model) -> None:
    report = flows.explain(model)
    assert [row["accelerated"] for row in report.rows] == [False] * 5
    assert "not accelerated" in report.rows[0]["reason"]
    report = flows.explain(flows.accelerate(model, precision="medium"))
    (row,) = report.rows
    assert set(row) == {"name", "kind", "accelerated", "reason"}
    assert (row["name"], row["kind"], row["accelerated"]) == ("heads.pose", "GraphINN", True)
    assert "8 half-couplings" in row["reason"]
    assert "medium" in row["reason"]
    lines = str(report).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("heads.pose")


def test_explain_says_that_the_reference_was_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    (row,) = flows.explain(flows.accelerate(model)).rows
    assert not row["accelerated"]
    assert "FASTHYP_BACKEND" in row["reason"]


def test_explain_names_dtypes_without_kernels() -> None:
    half = flows.accelerate(random_flow(6).bfloat16())
    assert "bfloat16" in flows.explain(half).rows[0]["reason"]


def test_nothing_to_accelerate() -> None:
    module = nn.Linear(2, 2)
    fast = flows.accelerate(module)
    assert flows.restore(fast) is module
    (row,) = flows.explain(fast).rows
    assert not row["accelerated"]
    assert "no flow" in row["reason"]


def test_subclasses_of_freia_are_left_alone() -> None:
    class Own(ff.GraphINN):
        pass

    plain = random_flow(6)
    net = Own(plain.node_list)
    fast = flows.accelerate(net)
    assert type(fast) is Own
    assert "no fused form of this class" in flows.explain(fast).rows[0]["reason"]


@pytest.mark.parametrize("call", [flows.accelerate, flows.restore, flows.explain])
def test_wrong_type(call: Any) -> None:
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, got str"):
        call("model")


def test_unknown_precision(model: Model) -> None:
    with pytest.raises(ValueError, match="precision: expected one of"):
        flows.accelerate(model, precision="best")


def test_a_module_that_cannot_be_copied() -> None:
    net = nn.Sequential(random_flow(6))
    net.lock = threading.Lock()
    with pytest.raises(TypeError, match="use inplace=True"):
        flows.accelerate(net)
    assert flows.accelerate(net, inplace=True) is net


@torch.no_grad()
def test_a_deep_graph() -> None:
    net = random_flow(6, blocks=150, hidden=4, spread=0.1).double()
    fast = flows.accelerate(net)
    assert all(row["accelerated"] for row in flows.explain(fast).rows)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(fast(x)[0], net(x)[0])
    assert not {id(node) for node in fast.node_list} & {id(node) for node in net.node_list}
    assert {id(node.module) for node in fast.node_list if node.module is not None} == {
        id(module) for module in fast.module_list
    }


def test_medium_precision_is_near() -> None:
    net = random_flow(9, (4,))
    x, c = torch.randn(64, 9), torch.randn(64, 4)
    with torch.no_grad():
        exact, near = net(x, c)[0], flows.accelerate(net, precision="medium")(x, c)[0]
    assert max_error(near, exact) < 0.2 * float(exact.abs().max())
