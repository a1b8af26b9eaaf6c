"""Files of models: everything comes back, and what does not fit is named."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasthyp.models._pretrained import PretrainedModel, config_from, load_exactly
from fasthyp.models.regression import Regression


@dataclass(frozen=True)
class Part:
    size: int = 2
    shares: tuple[float, ...] = (0.5, 0.5)


@dataclass(frozen=True)
class Config:
    width: int = 3
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    clip: float | None = None
    spans: tuple[tuple[int, int], ...] = ()
    flag: bool = False
    part: Part = field(default_factory=Part)


class Model(PretrainedModel):
    Config = Config

    def __init__(
        self, config: Config | None = None, head: nn.Module | None = None, **changes: Any
    ) -> None:
        super().__init__(config, **changes)
        self.linear = nn.Linear(self.config.width, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.head = head

    def saved_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("head.")}


class Other(Model):
    pass


def test_round_trip(tmp_path: Path) -> None:
    config = Config(5, 1.0, "b", 2.0, ((1, 2), (3, 4)), True, Part(7, (0.25,)))
    model = Model(config, head=nn.Linear(1, 1))
    model.steps.fill_(2**40)
    assert model.save_pretrained(tmp_path / "a/b") == tmp_path / "a/b"
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    head = nn.Linear(1, 1)
    again = Model.from_pretrained(tmp_path / "a/b", head=head)
    assert again.config == config
    assert not again.training
    assert again.head is head
    for name, value in model.saved_state().items():
        assert torch.equal(again.state_dict()[name], value)
        assert again.state_dict()[name].dtype == value.dtype


def test_settings() -> None:
    assert Model(width=4).config == Config(width=4)
    assert Model(Config(rate=2.0), width=4).config == Config(width=4, rate=2.0)
    with pytest.raises(TypeError, match="unknown setting 'widht'"):
        Model(widht=4)
    with pytest.raises(TypeError, match="config: expected Config, got dict"):
        Model({"width": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 1}, "unknown setting widht"),
        ({"width": "3"}, "width: expected int, got '3'"),
        ({"width": True}, "width: expected int, got True"),
        ({"width": 2.5}, "width: expected int"),
        ({"rate": None}, "rate: expected float, got None"),
        ({"kind": "c"}, "kind: expected"),
        ({"clip": "no"}, "clip: expected"),
        ({"spans": [[1, 2], [3]]}, "spans: expected"),
        ({"flag": 1}, "flag: expected bool"),
        ({"part": 3}, "part: expected Part"),
        ({"part": {"sizes": 3}}, "unknown setting sizes"),
        ({"width": {"a": 1}}, "width: expected no object"),
    ],
)
def test_refuses_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(Config, values)


def test_configs_of_json() -> None:
    values = {"rate": 1, "clip": 2, "spans": [[1, 2]], "part": {"shares": []}}
    assert config_from(Config, values) == Config(
        rate=1, clip=2, spans=((1, 2),), part=Part(shares=())
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable configuration"),
        ("[]", "expected a JSON object, got list"),
        ('{"model": "Other"}', "expected a Model, got 'Other'"),
        ("{}", "expected a Model, got None"),
        ('{"model": "Model", "depth": 3}', "unknown setting depth"),
        ('{"model": "Model", "width": -3}', "negative dimension"),
    ],
)
def test_refuses_config_files(tmp_path: Path, text: str, message: str) -> None:
    Model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, "tensor 'linear.bias' is missing"),
        ({"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({"linear.bias": torch.zeros(3)}, r"'linear.bias': expected \(2,\), got \(3,\)"),
    ],
)
def test_refuses_weights(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    model = Model()
    model.save_pretrained(tmp_path)
    tensors = {**model.saved_state(), **change}
    kept = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_exactly(model, kept, "file")


def test_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a readable configuration"):
        Model.from_pretrained(tmp_path / "none")
    Model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Model.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Model.from_pretrained(tmp_path)


def test_another_class_is_not_taken(tmp_path: Path) -> None:
    Model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a Other, got 'Model'"):
        Other.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == "Model"


@pytest.mark.parametrize("target", ["joints", "body"])
def test_regression(tmp_path: Path, target: str) -> None:
    from fasthyp.data import PersonBatch

    torch.manual_seed(0)
    model = Regression(features=12, width=8, target=target)
    persons = PersonBatch(features=torch.randn(4, 12))
    found = model.hypotheses(persons, 3, vertices=True)
    assert found.joints_3d.shape == (4, 3, 17, 3)
    assert torch.equal(found.joints_3d[:, 0], model(persons.need("features")[0]))
    model.save_pretrained(tmp_path)
    again = Regression.from_pretrained(tmp_path).hypotheses(persons, 3)
    assert torch.equal(again.joints_3d, found.joints_3d)
    if target == "body":
        assert found.vertices is not None
        assert found.vertices.shape == (4, 3, 34, 3)
        assert "body.v_template" not in model.saved_state()
        upright = found.joints_3d[:, 0, 10, 1]  # the head is up, y is down
        assert (upright < -0.3).all()
    else:
        assert found.vertices is None
        with pytest.raises(ValueError, match="target"):
            model.parameters_of(torch.zeros(1, 12))
    with pytest.raises(ValueError, match="features"):
        model(torch.zeros(2, 13))
    with pytest.raises(ValueError, match="expected features"):
        model.hypotheses(PersonBatch(mean=torch.zeros(2, 3, 2)), 1)
    with pytest.raises(ValueError, match="target: expected 'joints' or 'body'"):
        Regression(target="mesh")
