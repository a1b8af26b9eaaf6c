"""What the CUDA kernels need of a multiprocessor, as ptxas reports it; needs nvcc, but no GPU.

    python benchmarks/cuda_resources.py [--archs 75 90 ...] [--only WORD] [--json FILE]

Compiles every csrc/**/*.cu for each architecture. A row is a kernel: registers a thread, bytes of
static shared memory a block, bytes of stack and of spilled registers a thread. The exit status is 1
where a kernel spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (75, 80, 86, 89, 90, 100, 120)


def output_of(*command: str | Path) -> str:
    """Standard output and error; exits with them where the command fails."""
    done = subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def report_of(source: Path, arch: int) -> str:
    """What ptxas says about the kernels of one file."""
    with tempfile.TemporaryDirectory() as folder:
        return output_of(
            *("nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"),
            *('-DFASTHYP_CUDA_ARCHS="resources"', "-I", ROOT / "csrc", source),
            *("-o", Path(folder) / "out.cubin"),
        )


def kernels_in(report: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    properties = ""
    for line in report.splitlines():
        if start := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            found.append({"kernel": start[1], "arch": start[2]})
        elif function := re.search(r"Function properties for (\w+)", line):
            properties = function[1]
        elif found and (sizes := re.findall(r"(\d+) bytes (stack|spill)", line)):
            if properties in (found[-1]["kernel"], ""):
                found[-1]["stack"] = int(sizes[0][0])
                found[-1]["spills"] = sum(int(size) for size, _ in sizes[1:])
        elif found and (used := re.search(r"Used (\d+) registers", line)):
            found[-1]["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1]["shared"] = int(shared[1]) if shared else 0
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Kernels by what they are called in the source: family, name, template arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    plain = output_of(tool, *names).splitlines()
    for pattern in (
        r"^void ",
        r"fasthyp::",
        r"(\(anonymous namespace\)|<unnamed>|_GLOBAL__N__\w+)::",
    ):
        plain = [re.sub(pattern, "", name) for name in plain]
    return dict(zip(names, (re.sub(r"(?<=\w|>)\(.*\)$", "", name) for name in plain), strict=True))


def table(rows: list[dict[str, Any]], archs: list[str]) -> str:
    """A line a kernel, a column an architecture: registers, shared memory, and spills if any."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        text = f"{row['registers']} / {row['shared']}"
        spilled = f" spills {row['spills']}" if row["spills"] else ""
        cells.setdefault(row["kernel"], {})[row["arch"]] = text + spilled
    width = max(map(len, cells), default=0)
    lines = ["".join([f"{'registers / shared':{width}}", *(f"{'sm_' + a:>14}" for a in archs)])]
    for kernel, by_arch in cells.items():
        lines.append("".join([f"{kernel:{width}}", *(f"{by_arch.get(a, ''):>14}" for a in archs)]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("needs nvcc on PATH")

    sources = [path for path in sorted(ROOT.glob("csrc/**/*.cu")) if options.only in str(path)]
    jobs = list(itertools.product(sources, options.archs))
    with ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda job: report_of(*job), jobs))
    rows = [
        {"file": str(source.relative_to(ROOT)), **kernel}
        for (source, _), report in zip(jobs, reports, strict=True)
        for kernel in kernels_in(report)
    ]
    names = readable(sorted({row["kernel"] for row in rows}))
    rows = sorted(
        ({**row, "kernel": names[row["kernel"]]} for row in rows),
        key=lambda row: (row["file"], row["kernel"], int(row["arch"])),
    )
    print(table(rows, [str(arch) for arch in options.archs]))
    if options.json:
        path = Path(options.json)
        temporary = path.with_suffix(".tmp")
        compiler = output_of("nvcc", "--version").splitlines()[-2]
        command = "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        facts = {"nvcc": compiler, "command": command, "kernels": rows}
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        temporary.replace(path)
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
