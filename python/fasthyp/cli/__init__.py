"""The ``fasthyp`` command.

Bad input ends with exit code 2 and one line on stderr; outputs are complete or absent. What needs
torch or matplotlib is imported by the command that needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fasthyp.train import SYSTEMS

app = typer.Typer(
    name="fasthyp",
    help="Probabilistic human pose estimation: hundreds of 3D hypotheses per person, fast.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SYSTEMS = ("lifting", *SYSTEMS)

_ClickException: Any = typer.BadParameter.__mro__[2]  # typer may carry its own copy of click


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    highest = "highest"
    high = "high"
    medium = "medium"


NumSamples = Annotated[
    int, typer.Option("--num-samples", "-n", min=1, help="Hypotheses per person.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the noise.")]
OnDevice = Annotated[Device, typer.Option(help="Where to compute.")]
InPrecision = Annotated[
    Precision, typer.Option(help="highest: float32; medium: bfloat16 products where possible.")
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="Folder or .safetensors file of a trained model instead of the bundled one.",
        show_default="bundled",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataFormat = Annotated[
    str | None,
    typer.Option(
        help="cmu, persons, h36m, wehrbein, 3dhp, 3dpw, emdb or hmr.", show_default="found out"
    ),
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="NAME=VALUE", help="Of the data set's reader."),
]
Data = Annotated[Path, typer.Option(help="CMU motion capture poses, .npz.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(args=argv, prog_name="fasthyp", standalone_mode=False)
    except _ClickException as error:
        return _refuse(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError, ImportError) as error:
        return _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        return _refuse(f"out of memory: {error}")
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print("fasthyp: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        from fasthyp import __version__

        print(f"fasthyp {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def sample(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help=".npz with heatmaps (P,J,H,W) or (J,H,W), .npy of the same, or .npz with "
            "keypoints (P,J,2), covariances (P,J,2,2) and, if known, amplitudes (P,J) and "
            "image_size (H,W). J: the 17 COCO joints, or the 13 without eyes and ears. With "
            "--shard-size any data set.",
        ),
    ],
    num_samples: NumSamples = 1000,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="What to write: hypotheses, spread, fits; .npz.")
    ] = Path("hypotheses.npz"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the first person, or that of --person: .png, .pdf, .svg."),
    ] = None,
    person: Annotated[
        int | None,
        typer.Option(min=0, help="Only this person, counted from 0.", show_default="all"),
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.cpu,
    precision: InPrecision = Precision.high,
    model: Model = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Persons at a time; changes no hypothesis.")
    ] = 16,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Write a folder, --out, of files of so many persons each."),
    ] = None,
    format: DataFormat = None,
    option: DataOptions = None,
    as_json: Json = False,
) -> None:
    """Hypotheses of the 3D poses of persons, from the heatmaps of a 2D pose detector.

    The output holds, for P persons and M hypotheses, in mm, centred between the hips, x right,
    y down, z away from the camera: `hypotheses` (P,M,13,3), `log_prob` (P,M) in nats, `mode`
    (P,13,3), `covariance` (P,13,3,3) of the hypotheses, `std` (P,13) = sqrt(trace(covariance)), the
    Gaussians in `fit_*` (cells of the heatmap), `joint_names`, `seed`, `model` and `version`.

    With `--shard-size` the output is a folder, for any number of persons: files are read as they
    are needed, complete shards of an earlier run are kept, and processes that
    `torchrun --nproc-per-node N -m fasthyp sample ...` starts, on one machine or several, share the
    shards. Each holds `hypotheses` (n,M,J,3), the mode first, `log_prob`, `joint_names`, `first`.
    """
    if shard_size is not None:
        from fasthyp.cli._shards import run as run_sharded

        if plot is not None or person is not None:
            raise ValueError("--shard-size: expected no --plot and no --person with it")
        run_sharded(
            *(input, out, str(model or "lifting")),
            format=format,
            options=option or [],
            num_samples=num_samples,
            seed=seed,
            shard_size=shard_size,
            batch_size=batch_size,
            device=device.value,
            precision=precision.value,
            as_json=as_json,
        )
        return
    if format is not None or option:
        raise ValueError("--format and --option: expected --shard-size with them")
    from fasthyp.cli._sample import run

    run(
        *(input, out, plot),
        num_samples=num_samples,
        seed=seed,
        device=device.value,
        precision=precision.value,
        model=model,
        person=person,
        batch_size=batch_size,
        as_json=as_json,
    )


@app.command()
def view(
    input: Annotated[
        Path, typer.Argument(metavar="INPUT", help="What `fasthyp sample` wrote: .npz or folder.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write.", show_default="INPUT, as .html"),
    ] = None,
    person: Annotated[
        int | None,
        typer.Option(min=0, help="Only this person, counted from 0.", show_default="all"),
    ] = None,
    heatmaps: Annotated[
        Path | None,
        typer.Option(help="What the hypotheses were sampled from, to be shown beside them."),
    ] = None,
    max_persons: Annotated[int, typer.Option(min=1, help="Most persons in the page.")] = 16,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write hypotheses as a page to turn, sort and compare them in a browser.

    The page is one file and needs no connection.
    """
    from fasthyp.cli._view import run

    run(input, out, person=person, heatmaps=heatmaps, max_persons=max_persons, show=show)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")] = Path(
        "fasthyp_demo.png"
    ),
    num_samples: NumSamples = 1000,
    seed: Seed = 0,
    device: OnDevice = Device.cpu,
    precision: InPrecision = Precision.high,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Sample the pose of an astronaut whose legs are outside the photograph, and draw it."""
    from fasthyp.cli._sample import demo_captions, run

    with resources.as_file(resources.files("fasthyp.data") / "astronaut_heatmaps.npz") as heatmaps:
        run(
            *(heatmaps, None, out),
            num_samples=num_samples,
            seed=seed,
            device=device.value,
            precision=precision.value,
            model=model,
            as_json=as_json,
            captions=demo_captions,
        )


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, processor, devices and kernels."""
    from fasthyp import _diagnostics

    facts = _diagnostics.info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _diagnostics.lines(facts):
        table.add_row(name, text)
    Console(highlight=False).print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Run every kernel against its reference on a small input; exit code 1 if one is wrong."""
    from fasthyp import _diagnostics

    checks = _diagnostics.doctor()
    failed = [check for check in checks if not check.passed]
    if as_json:
        rows = [vars(check) for check in checks]
        print(json.dumps({"passed": not failed, "checks": rows}, indent=2))
    else:
        console = Console(highlight=False)
        for check in checks:
            mark = "[green]ok    [/]" if check.passed else "[red bold]FAILED[/]"
            console.print(f"{mark} {check.name:30}", escape(check.detail), soft_wrap=True)
            if not check.passed:
                console.print("       mend it:", escape(check.remedy), soft_wrap=True)
        verdict = f"{len(failed)} of {len(checks)} checks failed" if failed else "all is well"
        console.print(verdict, style="red bold" if failed else "green")
    raise typer.Exit(1 if failed else 0)


@app.command()
def bench(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="FAMILY",
            help="coupling, coupling_training, gaussian_fit, heatmaps, mmd, skinning or "
            "procrustes.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, on smaller inputs.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows here.")
    ] = None,
) -> None:
    """Time the kernels on this machine against the code that one would run without them.

    Peers are FrEIA, the formulas in PyTorch, and SciPy and smplx where they are installed; all of a
    row take turns in one process. On a CUDA device too, where the kernels are built for it.
    """
    from fasthyp.cli._bench import run

    run(family, quick=quick, json_path=json_path)


@app.command(
    help="Train a model: one of " + ", ".join(_SYSTEMS) + ".\n\nWrites the configuration, the "
    "curves, the last checkpoint and the best model into a folder."
)
def train(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help=", ".join(_SYSTEMS))],
    data: Annotated[Path, typer.Option(help="CMU motion capture poses, or a data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, checkpoints and curves.")],
    validation: Annotated[
        Path | None, typer.Option(help="Data set to validate on, where --data is one.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Recipe, .json; unset keys: defaults.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="What a CPU can train on simulated persons.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting instead of the recipe's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Processes, each with its own GPU.")] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to it.")] = False,
) -> None:
    from fasthyp.cli._train import run

    if system not in _SYSTEMS:
        raise ValueError(f"system: expected one of {', '.join(_SYSTEMS)}, got {system!r}")
    changes = {"steps": steps, "seed": seed}
    run(
        *(system, data, out),
        validation=validation,
        config=config,
        small=small,
        settings=settings or [],
        changes={name: value for name, value in changes.items() if value is not None},
        resume=resume,
        devices=devices,
        tensorboard=tensorboard,
    )


@app.command()
def simulate(
    poses: Annotated[
        Path,
        typer.Argument(
            metavar="POSES",
            help=".npz with poses_mm (N,17,3): Human3.6M's joints, mm, any world axes with z up.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write, .npz.")] = Path(
        "persons.npz"
    ),
    part: Annotated[
        str | None,
        typer.Option(
            help="train, validation or test of CMU poses, by subject and without glitches.",
            show_default="all poses, as one person's",
        ),
    ] = None,
    detector: Annotated[
        str, typer.Option(help="Joints: h36m17, mpii16, coco13 or coco17.")
    ] = "h36m17",
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Render them as well.")] = False,
    seed: Seed = 0,
) -> None:
    """See each pose once by a random camera and a simulated 2D detector.

    Writes what `fasthyp.data.PersonBatch` describes: joints in 3D and 2D, cameras, fitted
    Gaussians, features, and rotations and shape of a stick body with SMPL's tree of joints.
    """
    from fasthyp.cli._train import simulate as run

    run(poses, out, part, detector=detector, heatmaps=heatmaps, seed=seed)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a trained model, or `lifting` for the bundled one."
        ),
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="File or folder of a data set.")],
    format: DataFormat = None,
    option: DataOptions = None,
    num_samples: Annotated[
        str, typer.Option("--num-samples", "-n", help="For each M the best of M hypotheses.")
    ] = "1,10,200,1000",
    joints: Annotated[
        str | None,
        typer.Option(help="Names of joints to compare.", show_default="all that both have"),
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.cpu,
    batch_size: Annotated[int, typer.Option(min=1, help="Most persons at a time.")] = 64,
    as_json: Json = False,
) -> None:
    """Errors, scores, spread and calibration of a model's hypotheses on a data set.

    Under `torchrun --nproc-per-node N -m fasthyp evaluate ...` the processes share the persons; the
    figures stay the same.
    """
    from fasthyp.cli._evaluate import run

    try:
        numbers = [int(number) for number in num_samples.split(",")]
    except ValueError:
        raise ValueError(f"--num-samples: expected numbers, got {num_samples!r}") from None
    run(
        *(model, data),
        format=format,
        options=option or [],
        num_samples=numbers,
        joints=joints.split(",") if joints else None,
        seed=seed,
        device=device.value,
        batch_size=batch_size,
        as_json=as_json,
    )
