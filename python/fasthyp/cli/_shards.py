"""``fasthyp sample --shard-size``: run and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fasthyp._processes import place
from fasthyp.cli._data import open_data
from fasthyp.cli._sample import progress_bar
from fasthyp.models import load
from fasthyp.shards import sample_shards


def run(
    input: Path,
    out: Path,
    model: str,
    *,
    format: str | None,
    options: Sequence[str],
    num_samples: int,
    seed: int,
    shard_size: int,
    batch_size: int,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Sample this process's shards and say what was done.

    Raises:
        ValueError, OSError, ImportError: in one line what is wrong.
    """
    if out.is_file():
        raise ValueError(f"{out}: expected a folder, but it is a file")
    here = place(device)
    persons = open_data(input, format, options)
    network = load(model, here.device)
    with progress_bar("persons", -(-len(persons) // here.world)) as advance:
        done = sample_shards(
            *(network, persons, out, num_samples),
            seed=seed,
            shard_size=shard_size,
            batch_size=batch_size,
            device=here.device,
            precision=precision,
            rank=here.rank,
            world=here.world,
            about={"model": model, "data": str(input)},
            progress=advance if here.rank == 0 else lambda persons: None,
        )
    summary = {
        "folder": str(out),
        "persons": len(persons),
        "shards": done.shards,
        "process": here.rank,
        "processes": here.world,
        "made": done.made,
        "kept": done.kept,
    }
    if as_json:
        print(json.dumps(summary))
        return
    who = f"process {here.rank} of {here.world}: " if here.world > 1 else ""
    print(
        f"{who}made {len(done.made)} and kept {len(done.kept)} of {done.shards} shards in {out}",
        flush=True,
    )
