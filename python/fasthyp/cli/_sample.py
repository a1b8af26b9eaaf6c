"""What ``fasthyp sample`` and ``fasthyp demo`` share: run, write, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fasthyp._files import replacing
from fasthyp.models.lifting import LiftingFlow
from fasthyp.observations import read_observations
from fasthyp.pipeline import PoseHypotheses, check_memory, estimate
from fasthyp.skeleton import COCO13_JOINTS


def run(
    input: Path,
    out: Path | None,
    plot: Path | None,
    *,
    num_samples: int,
    seed: int,
    device: str,
    precision: str,
    model: Path | None,
    person: int | None = None,
    batch_size: int = 16,
    as_json: bool = False,
    captions: Callable[[PoseHypotheses], tuple[str, str]] | None = None,
) -> None:
    """Read, estimate, write ``out`` (.npz) and ``plot`` (a picture), and say what was done.

    Raises:
        ValueError, OSError: in one line what is wrong; neither file is then written.
    """
    paths = [path for path in (out, plot) if path is not None]
    if len({path.resolve() for path in (input, *paths)}) != 1 + len(paths):
        raise ValueError("input, output and plot: expected different files")
    if plot is not None:
        from fasthyp.viz import figure_format, pose_figure, save_figure

        picture_format = figure_format(plot.name)
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        observations = read_observations(input)
        if person is not None:
            observations = observations.person(person)
    first = person or 0
    check_memory(len(observations), num_samples)

    with ExitStack() as files:
        temporary = {path: files.enter_context(replacing(path)) for path in paths}
        with _timed(seconds, "load model"):
            network = load_model(model, device)
        with progress_bar("persons", len(observations)) as advance:
            result = estimate(
                *(observations, network, num_samples, seed, precision),
                batch_size=batch_size,
                first=first,
                progress=advance,
            )
        seconds |= result.seconds
        if out is not None:
            with _timed(seconds, "write"), temporary[out].open("wb") as file:
                result.save(file, _model_name(model))
        if plot is not None:
            with _timed(seconds, "plot"), temporary[plot].open("wb") as file:
                texts = captions(result) if captions else (None, None)
                save_figure(pose_figure(result, observations, 0, *texts), file, picture_format)

    spread = np.median(result.std, axis=0).round(1).tolist()
    missing = np.argwhere(~result.observed)
    summary = {
        "persons": len(observations),
        "num_samples": num_samples,
        "seed": seed,
        "model": _model_name(model),
        "device": device,
        "precision": precision,
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
        "std_mm": dict(zip(COCO13_JOINTS, spread, strict=True)),
        "not_fitted": [f"person {first + p}: {COCO13_JOINTS[j]}" for p, j in missing.tolist()],
        "written": [str(path) for path in paths],
    }
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_summary(summary)


def load_model(path: Path | None, device: str = "cpu") -> LiftingFlow:
    """The bundled model or that of ``path``; ValueError if it or the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but PyTorch finds no CUDA device")
    return LiftingFlow.from_pretrained(path).to(device)


def demo_captions(result: PoseHypotheses) -> tuple[str, str]:
    """Title and subtitle of the astronaut's picture."""
    variance = np.diagonal(result.covariance[0], axis1=1, axis2=2)
    across = np.sqrt(variance[:, 0] + variance[:, 1])

    def mm(part: str) -> str:
        return f"{across[[name.endswith(part) for name in COCO13_JOINTS]].mean():.0f} mm"

    return (
        f"{result.hypotheses.shape[1]:,} poses that fit one photograph",
        f"The legs are outside it: across the image the ankles vary by {mm('ankle')}, "
        f"the shoulders by {mm('shoulder')}. Depth is uncertain everywhere.",
    )


def _model_name(path: Path | None) -> str:
    return "lifting (bundled)" if path is None else str(path)


def _print_summary(summary: dict[str, Any]) -> None:
    console = Console(highlight=False)
    persons = summary["persons"]
    console.print(
        f"[bold]{persons} {'person' if persons == 1 else 'persons'}, "
        f"{summary['num_samples']:,} hypotheses each[/]"
    )
    console.print(
        f"{summary['model']}, {summary['device']}, precision {summary['precision']}, "
        f"seed {summary['seed']}",
        markup=False,
    )
    title = "spread, mm" if persons == 1 else "median spread, mm"
    spread = Table(title, "left", "right", box=None, pad_edge=False)
    std = summary["std_mm"]
    spread.add_row("nose", f"{std['nose']:.0f}")
    for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        spread.add_row(part, f"{std['left_' + part]:.0f}", f"{std['right_' + part]:.0f}")
    times = Table("time", "ms", box=None, pad_edge=False)
    for stage, value in summary["seconds"].items():
        times.add_row(stage, f"{1000 * value:.1f}")
    times.add_row("in all", f"{1000 * sum(summary['seconds'].values()):.1f}")
    for column in (*spread.columns[1:], times.columns[1]):
        column.justify = "right"
    both = Table.grid(padding=(0, 6))
    both.add_row(spread, times)
    console.print(both)
    missing = summary["not_fitted"]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        console.print(f"[yellow]not fitted[/] (taken as unseen): {'; '.join(missing[:4])}{more}")
    for path in summary["written"]:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal's stderr, nothing elsewhere; call it with what was done since."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total=total: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total=total: bar.update(task, advance=done, total=total)
