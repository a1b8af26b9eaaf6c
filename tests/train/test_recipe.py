"""The recipe runner: batches from (seed, step), exact resume, several processes, averages."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra 'train'")

import fasthyp.train.recipe as recipe_module
from fasthyp.data import PersonBatch, SimulatedPersons, StoredPersons
from fasthyp.metrics import mpjpe
from fasthyp.models import load
from fasthyp.models.regression import Regression
from fasthyp.train import SYSTEMS, baseline_errors, load_recipe, run
from fasthyp.train.baselines import mean_pose, nearest_neighbour
from fasthyp.train.curves import Curves
from fasthyp.train.recipe import VALIDATION_SEED, Recipe, RecipeConfig
from fasthyp.train.regression import RegressionRecipe, RegressionRecipeConfig
from tests.train.tiny import (
    TINY,
    AdversarialConfig,
    AdversarialRecipe,
    NoisyRecipe,
    SlowRecipe,
    source,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ADVERSARIAL = AdversarialConfig(
    steps=6, batch_size=16, validate_every=3, validation_size=300, log_every=1, clip_norm=1.0
)


@pytest.fixture(scope="module")
def persons() -> SimulatedPersons:
    return source()


def curve(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return loaded


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Two checkpoints, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{k}]")
    else:
        assert a == b, where


def test_a_run(tmp_path: Path, persons: SimulatedPersons) -> None:
    out = tmp_path / "run"
    model = run(RegressionRecipe(TINY, persons), out, progress=False)
    assert isinstance(model, Regression)
    assert not model.training
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "last.ckpt", "metrics.csv", "model",
    ]  # fmt: skip
    with open(out / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("123456")
    assert len(curve(out, "val_mode_mm")) == 2
    assert len(curve(out, "train_loss")) == 6
    assert curve(out, "train_joints") == curve(out, "train_loss")
    assert checkpoint(out)["recipe"]["step"] == 6
    config = json.loads((out / "config.json").read_text())
    assert config.pop("system") == "regression"
    assert RegressionRecipeConfig(**{**config, "milestones": ()}) == TINY
    # The model is the one of the best validation, and so are its numbers.
    loaded = load(out / "model")
    held = persons.sample(TINY.validation_size, VALIDATION_SEED, "validation")
    (truth,) = held.need("joints_3d")
    error = 1000 * mpjpe(loaded.hypotheses(held, 1).joints_3d[:, 0], truth, root=0)
    assert min(curve(out, "val_mode_mm")) == pytest.approx(float(error.mean()), rel=1e-5)


def test_it_learns(tmp_path: Path, persons: SimulatedPersons) -> None:
    config = replace(
        TINY, steps=80, batch_size=32, validate_every=80, learning_rate=1e-2, schedule="cosine"
    )
    for target in ("joints", "body"):
        out = tmp_path / target
        run(RegressionRecipe(replace(config, target=target), persons), out, progress=False)
        known = baseline_errors(persons, config.validation_size, VALIDATION_SEED, pool=500)
        assert curve(out, "val_mode_mm")[-1] < known["mean_pose_mm"] - 20
        assert load(out / "model").config.target == target  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "precision": "bf16"}])
def test_resumes_bit_for_bit(
    tmp_path: Path, persons: SimulatedPersons, settings: dict[str, Any]
) -> None:
    config = replace(TINY, **settings)
    run(NoisyRecipe(config, persons), tmp_path / "whole", progress=False)
    run(NoisyRecipe(replace(config, steps=3), persons), tmp_path / "parts", progress=False)
    model = run(NoisyRecipe(config, persons), tmp_path / "parts", resume=True, progress=False)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for part in ("state_dict", "optimizer_states", "recipe", "callbacks", "global_step"):
        assert_same(whole[part], parts[part], part)
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert_same(dict(model.state_dict()), dict(load(tmp_path / "whole/model").state_dict()))  # type: ignore[attr-defined]
    # Finished: nothing is left to do.
    again = run(NoisyRecipe(config, persons), tmp_path / "parts", resume=True, progress=False)
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_several_optimisers_resume_bit_for_bit(tmp_path: Path, persons: SimulatedPersons) -> None:
    recipe = AdversarialRecipe(ADVERSARIAL, persons)
    run(recipe, tmp_path / "whole", progress=False)
    assert recipe.step == 6
    assert recipe.global_step == 18  # what Lightning counts: every step of every optimiser
    assert curve(tmp_path / "whole", "step") == [1, 2, 3, 4, 5, 6]
    first = replace(ADVERSARIAL, steps=3)
    run(AdversarialRecipe(first, persons), tmp_path / "parts", progress=False)
    run(AdversarialRecipe(ADVERSARIAL, persons), tmp_path / "parts", resume=True, progress=False)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert len(whole["optimizer_states"]) == 2
    for part in ("state_dict", "optimizer_states", "recipe", "global_step"):
        assert_same(whole[part], parts[part], part)
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_killed_and_resumed(tmp_path: Path, persons: SimulatedPersons) -> None:
    """Killed while it trains, between validations or while it writes."""
    config = replace(TINY, steps=30)
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from dataclasses import replace\n"
        "from tests.train.tiny import TINY, SlowRecipe, source\n"
        "from fasthyp.train import run\n"
        f"run(SlowRecipe(replace(TINY, steps=30), source()), {str(tmp_path / 'killed')!r}, "
        "progress=False)\n"
    )
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "SECONDS_PER_STEP": "0.2",
        "PYTHONPATH": os.pathsep.join([str(Path(recipe_module.__file__).parents[2]), str(root)]),
    }
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=root, stderr=subprocess.PIPE
    ) as child:
        try:
            until = time.monotonic() + 120
            while not (tmp_path / "killed/last.ckpt").exists():
                assert child.poll() is None, child.stderr and child.stderr.read().decode()
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.3)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    step = checkpoint(tmp_path / "killed")["recipe"]["step"]
    assert 3 <= step < 30
    os.environ["SECONDS_PER_STEP"] = "0"
    try:
        run(SlowRecipe(config, persons), tmp_path / "killed", resume=True, progress=False)
        run(SlowRecipe(config, persons), tmp_path / "whole", progress=False)
    finally:
        del os.environ["SECONDS_PER_STEP"]
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert_same(*(checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "killed")))


@pytest.mark.parametrize("kind", ["one optimiser", "two"])
def test_two_processes_are_as_one(
    tmp_path: Path, persons: SimulatedPersons, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    monkeypatch.setattr(recipe_module, "_START_METHOD", "fork")  # quicker; without a GPU it may be

    def recipe() -> Recipe:
        if kind == "two":
            return AdversarialRecipe(ADVERSARIAL, persons)
        return RegressionRecipe(replace(TINY, ema_decay=0.5), persons)

    one = run(recipe(), tmp_path / "one", progress=False)
    two = run(recipe(), tmp_path / "two", progress=False, devices=2)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name in ("val_mode_mm", "val_best_mm", "train_loss", "train_joints", "step"):
        assert curve(tmp_path / "two", name) == pytest.approx(
            curve(tmp_path / "one", name), rel=1e-4
        )
    assert checkpoint(tmp_path / "two")["recipe"]["step"] == 6


def test_shares_of_a_batch(persons: SimulatedPersons) -> None:
    """What two processes draw is what one does, persons and noise."""
    recipe = RegressionRecipe(TINY, persons)

    def drawn(rows: slice) -> tuple[Tensor, Tensor, int]:
        recipe._begin(77, rows)
        return recipe.persons().need("mean")[0], recipe.normal(3), recipe.new_seed()

    whole, first, second = drawn(slice(None)), drawn(slice(0, 8)), drawn(slice(8, 16))
    for k in (0, 1):
        assert torch.equal(torch.cat([first[k], second[k]]), whole[k])  # type: ignore[list-item]
    assert first[2] == second[2] == whole[2] != recipe.new_seed()


def test_moving_average(tmp_path: Path, persons: SimulatedPersons) -> None:
    """It is what is validated and saved; the decay rises as (1 + step) / (10 + step)."""
    seen: list[list[Tensor]] = []

    class Watched(RegressionRecipe):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            seen.append([p.detach().clone() for p in self.model.parameters()])

    config = replace(TINY, ema_decay=0.25, learning_rate=0.1, steps=4, validate_every=4)
    recipe = Watched(config, persons)
    average = [p.detach().clone() for p in recipe.model.parameters()]
    model = run(recipe, tmp_path / "run", progress=False)
    for step, current in enumerate(seen, 1):
        decay = min(0.25, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * c for a, c in zip(average, current, strict=True)]
    for mine, kept in zip(average, model.parameters(), strict=True):
        torch.testing.assert_close(kept.detach(), mine)
    state = checkpoint(tmp_path / "run")
    for name, current in zip(dict(model.named_parameters()), seen[-1], strict=True):
        assert torch.equal(state["state_dict"][f"model.{name}"], current)
    held = persons.sample(300, VALIDATION_SEED, "validation")
    with torch.no_grad():
        pose = model.hypotheses(held, 1).joints_3d[:, 0]  # type: ignore[operator]
    error = 1000 * mpjpe(pose, held.need("joints_3d")[0], root=0).mean()
    assert curve(tmp_path / "run", "val_mode_mm")[0] == pytest.approx(float(error), rel=1e-5)


def test_schedules(persons: SimulatedPersons) -> None:
    def factors(**settings: Any) -> list[float]:
        config = replace(TINY, **{"steps": 10, "warmup_steps": 0, **settings})
        recipe = RegressionRecipe(config, persons)
        return [recipe.learning_rate_factor(step) for step in range(11)]

    assert factors() == [1.0] * 11
    assert factors(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = factors(schedule="cosine")
    assert (cosine[0], cosine[5], cosine[10]) == (1.0, pytest.approx(0.5), pytest.approx(0.0))
    assert factors(schedule="step", milestones=(3, 7), decay=0.5) == [
        *([1.0] * 3), *([0.5] * 4), *([0.25] * 4),
    ]  # fmt: skip


def test_learning_rates_and_clipping_reach_the_optimiser(
    tmp_path: Path, persons: SimulatedPersons
) -> None:
    rates: list[float] = []
    norms: list[float] = []

    class Watched(RegressionRecipe):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            super().on_train_batch_end(*args)

    config = replace(TINY, clip_norm=1e-3, learning_rate=0.5, warmup_steps=5)
    run(Watched(config, persons), tmp_path / "run", progress=False)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert norms
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_bf16_reaches_the_losses(tmp_path: Path, persons: SimulatedPersons) -> None:
    types = set()

    class Watched(RegressionRecipe):
        def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
            types.add(self.model.trunk(persons.need("features")[0]).dtype)
            return super().losses(persons)

    for precision in ("bf16", "float32"):
        config = replace(TINY, precision=precision, steps=1)
        run(Watched(config, persons), tmp_path / precision, progress=False)
    assert types == {torch.bfloat16, torch.float32}


def test_weights_of_the_terms(tmp_path: Path, persons: SimulatedPersons) -> None:
    class Weighed(RegressionRecipe):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.weights = {"joints": 2.0, "half": 0.5}

        def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
            terms = super().losses(persons)
            return {**terms, "half": terms["joints"]}

    run(Weighed(TINY, persons), tmp_path / "run", progress=False)
    terms, loss = (curve(tmp_path / "run", f"train_{name}") for name in ("joints", "loss"))
    assert loss == pytest.approx([2.5 * term for term in terms], rel=1e-6)


def test_unknown_truths_do_not_count(persons: SimulatedPersons) -> None:
    held = persons.sample(4, 0, "test")
    joints = held.need("joints_3d")[0].clone()
    recipe = RegressionRecipe(TINY, persons)
    before = recipe.validate(held)["mode_mm"]
    joints[0, 3] = torch.nan
    after = recipe.validate(replace(held, joints_3d=joints))["mode_mm"]
    assert torch.equal(before[1:], after[1:])
    assert after[0].isfinite()
    assert after[0] != before[0]


def test_refuses(tmp_path: Path, persons: SimulatedPersons) -> None:
    recipe = RegressionRecipe(replace(TINY, steps=1), persons)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no checkpoint"):
        run(recipe, out, resume=True, progress=False)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 devices, got 16"):
        run(recipe, out, progress=False, devices=3)
    assert not out.exists()
    run(recipe, out, progress=False)
    with pytest.raises(ValueError, match="holds a run already"):
        run(recipe, out, progress=False)
    with pytest.raises(ValueError, match="differs from"):
        run(RegressionRecipe(replace(TINY, seed=1), persons), out, resume=True, progress=False)
    (out / "last.ckpt").write_bytes((out / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run(recipe, out, resume=True, progress=False)
    torch.save({"state_dict": {}}, out / "last.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of a recipe"):
        run(recipe, out, resume=True, progress=False)
    with pytest.raises(TypeError, match="expected RegressionRecipeConfig"):
        RegressionRecipe(RecipeConfig(), persons)  # type: ignore[arg-type]


def test_checkpoints_run_nothing(tmp_path: Path, persons: SimulatedPersons) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    out = tmp_path / "run"
    recipe = RegressionRecipe(replace(TINY, steps=1), persons)
    run(recipe, out, progress=False)
    torch.save({"recipe": {"step": 0, "average": Evil()}}, out / "last.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run(recipe, out, resume=True, progress=False)
    assert not (tmp_path / "evil").exists()


def test_a_failed_write_leaves_the_last_checkpoint(
    tmp_path: Path, persons: SimulatedPersons, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(RegressionRecipe(replace(TINY, steps=3), persons), out, progress=False)
    before = (out / "last.ckpt").read_bytes()

    def half(checkpoint: Any, path: Any) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(recipe_module.torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        run(RegressionRecipe(TINY, persons), out, resume=True, progress=False)
    assert (out / "last.ckpt").read_bytes() == before
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"schedule": "linear"}, "schedule"),
        ({"precision": "float16"}, "precision"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refuses_configs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**settings)


def test_systems() -> None:
    for name in SYSTEMS:
        kind = load_recipe(name)
        assert kind.name == name
        kind.Config()
    with pytest.raises(ValueError, match=r"system: expected one of .*regression.*, got 'foo'"):
        load_recipe("foo")


def test_baselines(persons: SimulatedPersons) -> None:
    known, held = persons.sample(50, 0, "train"), persons.sample(6, 0, "test")
    poses = known.need("joints_3d")[0]
    assert torch.equal(nearest_neighbour(known[:5], known), poses[:5])
    torch.testing.assert_close(mean_pose(held, known)[3], poses.mean(0))
    errors = baseline_errors(persons, 6, 0, "test", pool=50)
    truth = held.need("joints_3d")[0]
    for name, poses in (
        ("mean_pose_mm", mean_pose(held, known)),
        ("nearest_neighbour_mm", nearest_neighbour(held, known)),
    ):
        expected = 1000 * (poses - truth).norm(dim=-1).mean()
        assert errors[name] == pytest.approx(float(expected), rel=1e-5)


def test_curves_keep_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    curves = Curves(path)
    curves.log_metrics({"train_loss": 0.1, "epoch": 0}, 1)
    curves.save()
    assert not path.exists()  # written with each validation, whole
    curves.log_metrics({"val_loss": 1 / 3}, 2)
    curves.log_metrics({"train_loss": 0.25}, 3)
    curves.save()
    again = Curves(path, step=2)
    again.log_metrics({"train_loss": 0.5}, 3)
    again.finalize("success")
    lines = ["step,train_loss,val_loss", "1,0.1,", "2,,0.3333333333333333", "3,0.5,"]
    assert path.read_text().splitlines() == lines


def test_of_files(tmp_path: Path, persons: SimulatedPersons) -> None:
    from fasthyp.data.readers import save_persons
    from tests.synthetic import write_mocap

    cmu = write_mocap(tmp_path / "cmu.npz")
    made = RegressionRecipe.make_source(TINY, cmu)
    assert isinstance(made, SimulatedPersons)
    assert made.detector_names == persons.detector_names
    stored = tmp_path / "persons.npz"
    save_persons(stored, persons.sample(20, 0, "test"))
    known = RegressionRecipe.make_source(TINY, stored, stored)
    assert isinstance(known, StoredPersons)
    run(RegressionRecipe(TINY, known), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="validation"):
        RegressionRecipe.make_source(TINY, stored)
    with pytest.raises(FileNotFoundError, match="none"):
        RegressionRecipe.make_source(TINY, tmp_path / "none.npz")
