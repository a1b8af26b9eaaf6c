"""Sharded sampling: the same hypotheses however many processes there are, and however often they
were stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthyp import shards
from fasthyp.cli import main
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import cmu, persons, save_persons
from fasthyp.models import Hypotheses
from fasthyp.shards import Shards, read_manifest, sample_shards, shard_path
from tests.synthetic import write_mocap

N, M, SIZE = 23, 6, 5  # five shards, the last of three persons


class Noise:
    """Hypotheses of numbers alone: of the seed, the person's number and its features."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at

    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        if self.die_at is not None and image_offset >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert persons.features is not None
        poses = []
        for row, features in enumerate(persons.features):
            generator = torch.Generator().manual_seed(1000 * seed + image_offset + row)
            poses.append(features + torch.randn(num_samples, 2, 3, generator=generator))
        joints = torch.stack(poses)
        return Hypotheses(joints, ("pelvis", "head"), joints.square().sum((-1, -2)))


@pytest.fixture
def data(tmp_path: Path) -> Any:
    batch = PersonBatch(features=torch.arange(3.0 * N).view(N, 3))
    save_persons(tmp_path / "persons.npz", batch)
    return persons(tmp_path / "persons.npz")


def run(data: Any, folder: Path, **options: Any) -> shards.Done:
    model = options.pop("model", Noise())
    return sample_shards(model, data, folder, M, **{"shard_size": SIZE, "batch_size": 2, **options})


def in_process(work: Callable[[], Any]) -> int | None:
    """The exit code of a process that does this."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.npz"))}


@pytest.fixture
def expected(data: Any, tmp_path: Path) -> dict[str, bytes]:
    assert run(data, tmp_path / "alone") == shards.Done([0, 1, 2, 3, 4], [], 5)
    return content(tmp_path / "alone")


def test_what_a_run_holds(data: Any, expected: Any, tmp_path: Path) -> None:
    found = Shards(tmp_path / "alone")
    assert (len(found), found.joint_names) == (N, ("pelvis", "head"))
    batch = data[:]
    answer = Noise().hypotheses(batch, M)
    for person in (0, 4, 5, N - 1):
        np.testing.assert_array_equal(found[person], 1000 * answer.joints_3d[person].numpy())
        np.testing.assert_array_equal(found.log_prob(person), answer.log_prob[person].numpy())  # type: ignore[index]
    with pytest.raises(IndexError):
        found[N]
    with np.load(shard_path(tmp_path / "alone", 4), allow_pickle=False) as last:
        assert last["hypotheses"].shape == (3, M, 2, 3)
        assert int(last["first"]) == 20
    manifest = read_manifest(tmp_path / "alone")
    assert (manifest["persons"], manifest["num_samples"], manifest["seed"]) == (N, M, 0)
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [
        "manifest.json",
        *expected,
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing(
    data: Any, expected: Any, tmp_path: Path, batch_size: int
) -> None:
    run(data, tmp_path / "other", batch_size=batch_size)
    assert content(tmp_path / "other") == expected


def test_processes_share_the_shards(data: Any, expected: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=lambda rank=rank: run(data, folder, rank=rank, world=2))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert content(folder) == expected
    # and a third, of another number of processes, has nothing left to do
    assert run(data, folder, rank=1, world=3) == shards.Done([], [1, 4], 5)


def test_killed_and_resumed(data: Any, expected: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # in the middle of the third shard
    assert in_process(lambda: run(data, folder, model=Noise(die_at=12))) == -signal.SIGKILL
    assert list(content(folder)) == ["shard-000000.npz", "shard-000001.npz"]
    with pytest.raises(ValueError, match=r"shard-000002\.npz: the run is not complete"):
        Shards(folder)
    assert run(data, folder) == shards.Done([2, 3, 4], [0, 1], 5)
    assert content(folder) == expected


def test_killed_while_writing(
    data: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def half(file: Any, **arrays: Any) -> None:
        file.write(b"PK half of a shard")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        assert in_process(lambda: run(data, folder)) == -signal.SIGKILL
    assert content(folder) == {}
    assert len(list(folder.glob(".shard-*.tmp"))) == 1
    assert run(data, folder).made == [0, 1, 2, 3, 4]
    assert content(folder) == expected
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "other run", "other place"])
def test_a_damaged_shard_is_made_again(
    data: Any, expected: Any, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "alone"
    path = shard_path(folder, 1)
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[raw.index(b"hypotheses.npy") + 400] ^= 1  # a number of the hypotheses
    elif damage == "truncated":
        raw = raw[:-30]
    elif damage == "empty":
        raw = bytearray()
    elif damage == "other run":
        run(data, tmp_path / "other", seed=1)
        raw = bytearray(shard_path(tmp_path / "other", 1).read_bytes())
    else:
        raw = bytearray(shard_path(folder, 2).read_bytes())
    assert bytes(raw) != expected[path.name]
    path.write_bytes(raw)
    assert run(data, folder) == shards.Done([1], [0, 2, 3, 4], 5)
    assert content(folder) == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": 1}, "seed is 0 there, 1 now"),
        ({"shard_size": 6}, "shard_size is 5 there, 6 now"),
        ({"model": torch.nn.Linear(2, 2)}, "weights"),
    ],
)
def test_another_run_is_refused(
    data: Any, expected: Any, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"holds another run: {name}"):
        run(data, tmp_path / "alone", **options)
    assert content(tmp_path / "alone") == expected


def test_other_persons_are_refused(data: Any, expected: Any, tmp_path: Path) -> None:
    batch = PersonBatch(features=torch.arange(3.0 * N).view(N, 3) + 1)
    save_persons(tmp_path / "others.npz", batch)
    with pytest.raises(ValueError, match="holds another run: first_and_last"):
        run(persons(tmp_path / "others.npz"), tmp_path / "alone")
    with pytest.raises(ValueError, match="holds another run: persons is 23 there, 12 now"):
        run(persons(tmp_path / "others.npz", every=2), tmp_path / "alone")
    (tmp_path / "alone" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable manifest"):
        run(data, tmp_path / "alone")


def test_memory_does_not_grow_with_the_persons(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a batch of persons is asked for at once."""
    asked = []

    class Watched:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, rows: slice) -> PersonBatch:
            asked.append(len(range(*rows.indices(N))))
            return data[rows]

    run(Watched(), tmp_path / "run", batch_size=2)
    assert max(asked) == 2
    with pytest.raises(ValueError, match="GiB"):
        sample_shards(Noise(), data, tmp_path / "big", 10**9)


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(write_mocap(Path("cmu.npz")))
    sample = ["sample", source, "-O", "persons=7", "-n", "5", "--shard-size", "3", "--json"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main([*sample, "--out", "two"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["made"] == [[0, 2], [1]][int(rank)]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert main([*sample[:-1], "--out", "one"]) == 0
    assert "made 3 and kept 0 of 3 shards in one" in capsys.readouterr().out
    assert content(Path("one")) == content(Path("two"))
    assert read_manifest("one")["model"] == "lifting"
    # the first is the mode, the others are those of the form with one file
    batch = cmu(source, persons=7)[:]
    sigmas = {"keypoints": batch.mean, "covariances": batch.covariance}
    arrays = {"amplitudes": batch.amplitude, "image_size": torch.tensor([64, 64]), **sigmas}
    np.savez("gaussians.npz", **{name: value.numpy() for name, value in arrays.items()})  # type: ignore[union-attr]
    assert main(["sample", "gaussians.npz", "-n", "4", "--out", "single.npz"]) == 0
    with np.load("single.npz") as single:
        found = Shards("one")
        for person in range(7):
            np.testing.assert_allclose(found[person][0], single["mode"][person], atol=1e-3)
            np.testing.assert_allclose(found[person][1:], single["hypotheses"][person], atol=1e-3)
    for bad, message in (
        (["--plot", "a.png"], "expected no --plot"),
        (["--precision", "highest"], "precision is 'high' there, 'highest' now"),
        (["-n", "6"], "num_samples is 5 there, 6 now"),
        (["--out", source], "expected a folder"),
    ):
        assert main([*sample, "--out", "one", *bad]) == 2
        assert message in capsys.readouterr().err
    assert main(["sample", source, "-O", "persons=7"]) == 2
    assert "expected --shard-size" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*sample, "--out", "one"]) == 2
    assert "RANK: expected 0 to WORLD_SIZE - 1" in capsys.readouterr().err
