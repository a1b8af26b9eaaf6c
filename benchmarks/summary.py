"""The README's table of measurements, made from ``benchmarks/results``.

    python benchmarks/summary.py                 # writes it between the README's markers
    python benchmarks/summary.py --check         # exit code 1 where the README says otherwise
    python benchmarks/summary.py --plots FOLDER  # draws the sweeps, *_sweep.json, log-log, as .png

Rows and peers that no file holds are left out. ``NAME_avx2.json`` gives the times, ``NAME.json`` of
a processor with AVX-512 the ratios in the last two columns.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

LABELS = {"highest_ms": "fasthyp, float32", "medium_ms": "fasthyp, bf16"}  # in plots


class Headline(NamedTuple):
    """A row of the table: what it is called, where it is measured, and who runs in it."""

    label: str
    results: str  # of files NAME_avx2.json and NAME.json
    workload: str
    peer: str
    peer_label: str
    ours: str = "fasthyp"


_TRAINING = "coupling_training"
HEADLINES = (
    Headline(
        *("1000 hypotheses, 48-d flow, 8 blocks, hidden 1024", "coupling"),
        *("48-d, 2-layer 1024, 1000 hypotheses", "eager", "FrEIA", "highest"),
    ),
    Headline(
        *("1000 hypotheses, 132-d flow, 3-layer subnets of 1024", "coupling"),
        *("132-d, 3-layer 1024, 1000 hypotheses", "eager", "FrEIA", "highest"),
    ),
    Headline(
        *("1000 hypotheses, ConditionalGlow 144-d, context 2048", "coupling"),
        *("ConditionalGlow 144-d, 1000 hypotheses", "eager", "nflows' layers", "highest"),
    ),
    Headline(
        *("1 hypothesis, 48-d flow, again and again", "coupling"),
        *("48-d, 2-layer 1024, 1 hypothesis, again and again", "eager", "FrEIA", "highest"),
    ),
    Headline(
        *("1 hypothesis, 48-d flow, weights not in cache", "coupling"),
        *("48-d, 2-layer 1024, 1 hypothesis, weights not in cache", "eager", "FrEIA", "highest"),
    ),
    Headline(
        *("training step, inverse + backward, 64 x 200 rows, 48-d flow", _TRAINING),
        *("48-d, inverse, 64 x 200 rows", "eager", "FrEIA", "reversible"),
    ),
    Headline(
        *("the same, called as FrEIA is: a condition for every row", _TRAINING),
        *("48-d, inverse, 64 x 200 rows", "eager", "FrEIA", "accelerated"),
    ),
    *(
        Headline(
            *(f"training step of ConditionalGlow 144-d, {rows} rows", _TRAINING),
            *(f"ConditionalGlow 144-d, inverse, {rows} rows", "eager", "nflows' layers"),
            "reversible",
        )
        for rows in ("16 x 32", "64 x 25")
    ),
    Headline(
        *("whole training step of PoseINN, 1028 wide, 64 x 200, CPU time", "pose_inn_training"),
        *("a whole step, 64 persons, 200 hypotheses", "plain_cpu", "FrEIA, the formulas"),
        "fasthyp_cpu",
    ),
    Headline(
        *("16 Gaussian fits, 64x64 heatmaps", "gaussian_fit"),
        *("16 maps", "scipy", "SciPy", "2 threads"),
    ),
    Headline(
        *("MMD, 1088 x 25 x 2, forward + backward", "mmd"),
        *("1088 x 25 x 2", "eager", "HUMR's formula"),
    ),
    Headline(
        *("MMD, 4000 samples of 48, forward + backward", "mmd"),
        *("4000 x 48", "eager", "the formula"),
    ),
    Headline(
        *("25 samples of 64 x 17 heatmaps", "heatmaps"),
        *("64 x 17 maps, 25 samples, temperature 1", "multinomial", "torch.multinomial"),
    ),
    Headline("SMPL, vertices of 1000 bodies", "skinning", "vertices, 1000", "smplx", "smplx"),
    Headline("SMPL, 17 joints of 1000 bodies", "skinning", "17 joints, 1000", "smplx", "smplx"),
    Headline("SMPL, call of one body", "skinning", "call, 1", "smplx", "smplx"),
    Headline(
        *("1000 samples in 6D to 17 joints in the image", "skinning"),
        *("samples to 2D, 1000", "smplx", "smplx"),
    ),
    Headline(
        *("PA-MPJPE, 200 hypotheses of 512 poses", "metrics"),
        *("PA-MPJPE 200 x 512", "batched", "torch.linalg.svd"),
    ),
)


class Measured(NamedTuple):
    ms: float
    mb: float | None


def load(name: str) -> dict[str, Any] | None:
    """Machine and rows of a file of ``results``, None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def contenders(result: dict[str, Any] | None, workload: str) -> dict[str, Measured]:
    """The times on the CPU of all that ran a workload.

    Rows are of one contender, in ``run`` and ``ms``, or of all, in ``NAME_ms`` or ``NAME_s``."""
    found: dict[str, Measured] = {}
    for row in result["rows"] if result else ():
        if row["workload"] != workload or row.get("device", "cpu") != "cpu":
            continue
        for key, value in row.items():
            name, _, unit = key.rpartition("_")
            if key == "ms":
                found[row["run"]] = Measured(value, row.get("extra_mb"))
            elif unit in ("ms", "s"):
                mb = row.get(f"{name}_mb")
                found.setdefault(name, Measured(value * (1 if unit == "ms" else 1e3), mb))
    return found


def significant(value: float) -> str:
    """Three digits, and the zeros at the end."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def cost(measured: Measured) -> str:
    text = f"{significant(measured.ms)} ms"
    if measured.ms >= 999.5:
        text = f"{significant(measured.ms / 1e3)} s"
    if measured.mb is None:
        return text
    if measured.mb >= 999.5:
        return f"{text}, {significant(measured.mb / 1e3)} GB"
    return f"{text}, {measured.mb:.0f} MB" if measured.mb >= 1 else f"{text}, {measured.mb:.1f} MB"


def ratio(peer: Measured, ours: Measured) -> str:
    value = peer.ms / ours.ms
    return f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"


def line(headline: Headline) -> str | None:
    """A row of the table; None where it was not measured."""
    here = contenders(load(f"{headline.results}_avx2"), headline.workload)
    if headline.peer not in here or headline.ours not in here:
        return None
    peer, ours = here[headline.peer], here[headline.ours]
    cells = [headline.label, f"{cost(peer)} ({headline.peer_label})"]
    ratios = f"**{ratio(peer, ours)}**"
    if "compiled" in here:
        cells[1] += f", {cost(here['compiled'])} compiled"
        ratios += f", {ratio(here['compiled'], ours)}"
    cells += [cost(ours), ratios]
    there = contenders(load(headline.results), headline.workload)
    wide = ""
    if headline.peer in there and headline.ours in there:
        wide = f"**{ratio(there[headline.peer], there[headline.ours])}**"
        if "compiled" in there:
            wide += f", {ratio(there['compiled'], there[headline.ours])}"
    half = ""
    if "medium" in there:
        half = f"**{ratio(there[headline.peer], there['medium'])}**"
    return f"| {' | '.join([*cells, wide, half])} |".replace("|  ", "| ")


def origins(names: list[str]) -> list[str]:
    """Machine, versions and commits of files, one sentence for each machine."""
    places: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        result = load(name)
        if result is None:
            continue
        machine = result["machine"]
        key = (
            machine["processor"],
            f"{machine['cores']} cores",
            f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}",
            {"avx2": "AVX2", "avx512": "AVX-512", "avx512bf16": "AVX512-BF16"}.get(
                machine["simd"], machine["simd"]
            ),
            f"Python {machine['python']}",
            f"torch {machine['torch']}",
        )
        places.setdefault(key, []).append(f"`{name}` ({machine['commit']})")
    return [f"{', '.join(key)}: {', '.join(files)}." for key, files in places.items()]


def rates(name: str) -> str:
    """The range of the float32 flows' shares of the rate of a matrix product."""
    result = load(name)
    found = [
        row["rate"]
        for row in (result["rows"] if result else ())
        if row["run"] == "highest" and "rate" in row
    ]
    if not found:
        return ""
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    return low if low == high else f"{low} to {high}"


def section() -> str:
    """All that stands between the markers."""
    lines = {headline: line(headline) for headline in HEADLINES}
    names = list(dict.fromkeys(headline.results for headline, text in lines.items() if text))
    table = [
        "| workload | peer | fasthyp, AVX2 | | on AVX512-BF16: float32 | bf16 |",
        "|---|---|---|---|---|---|",
        *filter(None, lines.values()),
    ]
    caption = [
        "Medians, and ratios to the peer, eager and under `torch.compile`, of contenders that take",
        "turns in one process. `benchmarks/bench_NAME.py` measures, `benchmarks/results/` holds",
        "the figures (of the commit in brackets), and `benchmarks/summary.py` makes this table.",
        *origins([f"{name}_avx2" for name in names] + names),
    ]
    here, there = rates("coupling_avx2"), rates("coupling")
    if here and there:
        caption.append(
            f"Sampling runs at {here} of the rate of one large torch float32 matrix product "
            f"with AVX2, at {there} with AVX-512."
        )
    return "\n".join([*table, "", *caption])


def replaced(readme: str) -> str:
    """The README with the present table."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def plot(path: Path, folder: Path) -> Path:
    """Time against size, log-log, of the contenders of a sweep; one curve for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    size, rows = result["machine"]["sweep"], result["rows"]
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name in dict.fromkeys(key for row in rows for key in row if key.endswith("_ms")):
        points = [(row[size], row[name]) for row in rows if name in row]
        axes.loglog(*zip(*points, strict=True), marker="o", label=LABELS.get(name, name[:-3]))
    axes.set(xlabel=size, ylabel="ms", title=rows[0]["workload"])
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    target = folder / f"{path.stem}.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the sweeps instead")
    options = parser.parse_args(argv)
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        for path in sorted(RESULTS.glob("*_sweep.json")):
            print(plot(path, options.plots))
        return 0
    present = README.read_text()
    wanted = replaced(present)
    if options.check:
        if present != wanted:
            print("README.md: not the table of benchmarks/results; run benchmarks/summary.py")
        return int(present != wanted)
    temporary = README.with_suffix(".tmp")
    temporary.write_text(wanted)
    temporary.replace(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
