"""Builds the CUDA sources for the host, against the emulation in this folder, and runs programs.

AddressSanitizer and UndefinedBehaviorSanitizer watch them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    '-DFASTHYP_CUDA_ARCHS="host"',
    *("-I", str(HERE), "-I", str(SOURCES)),
]


def build(target: Path, *sources: Path) -> Path:
    """A program, or an object file where the target's name says so."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    kind = ["-c"] if target.suffix == ".o" else []
    objects = [path for path in sources if path.suffix == ".o"]
    texts = [path for path in sources if path.suffix != ".o"]  # .cu is C++ to the compiler
    inputs = [*objects, *(word for path in texts for word in ("-x", "c++", path))]
    command = [COMPILER, *FLAGS, *kind, *map(str, inputs), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "sanitizer" in done.stderr and "No such file" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return target


def build_kernels(target: Path, emulation: Path, *names: str) -> Path:
    """The program ``<target's name>.cpp`` of this folder with CUDA sources of the project."""
    kernels = [SOURCES / name for name in (*names, "common/cuda_device.cu")]
    sources = [HERE / f"{target.name}.cpp", *kernels]
    objects = [target.with_name(f"{target.name}-{path.stem}{path.suffix}.o") for path in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return build(target, *pool.map(build, objects, sources), emulation)


def execute(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # leaks: the fibers' own bookkeeping is of no interest
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
